"""Training on the user's own file, and predicting with the checkpoint."""

import numpy as np

from gemma_encoder.inference import Predictor
from gemma_encoder.training import loop


def test_a_csv_becomes_a_predictor(micro, tmp_path):
    path = tmp_path / "train.csv"
    path.write_text(
        "review text,stars\n"
        + "".join(
            f'"it was {word}, number {i}",{word}\n' for i in range(30) for word in ("good", "bad")
        )
    )
    outcome = loop.train(
        micro(
            tasks=("own",),
            own__train=str(path),
            own__label="stars",
            train_for="12 steps",
            log_every="6 steps",
        ),
        tmp_path / "run",
    )
    assert outcome.metrics["own"].keys() == {"accuracy", "macro_f1"}
    path.unlink()  # a checkpoint needs no data
    predictor = Predictor.load(tmp_path / "run")
    assert predictor.tasks["own"].classes == ("bad", "good")
    probabilities = predictor.predict(
        [{"review_text": "it was good"}, {"review_text": "it was bad"}], "own"
    )
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)
    assert list(probabilities.argmax(axis=1)) == [1, 0]
