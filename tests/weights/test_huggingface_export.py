"""Exports to Hugging Face folders load as the same model, or are refused."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from gemma_encoder import digests
from gemma_encoder.inference import Predictor, export_huggingface
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.task import Task
from gemma_encoder.inputs.template import Template
from gemma_encoder.inputs.tokenizer import Tokenizer
from gemma_encoder.inputs.uncertainty import Calibration
from gemma_encoder.model.config import EncoderConfig, HeadConfig, PoolingConfig
from gemma_encoder.model.encoder import abstract_encoder, parameter_dict, parameter_paths
from gemma_encoder.model.sizes import GEMMA_CONFIGS
from gemma_encoder.weights import backbone as weights
from gemma_encoder.weights import export
from gemma_encoder.weights.native import InferenceSpec
from gemma_encoder.weights.sentence_modules import output_scale
from tests.weights.goldens import CASES, GOLDENS


def make_predictor(transformer, classes=("no", "yes"), **fields) -> Predictor:
    """Returns a predictor with random parameters and the small tokenizer."""
    tasks = ()
    if classes is not None:
        template = Template("{text}")
        tasks = (Task("t", "classification", template, metrics=("accuracy",), classes=classes),)
    defaults = {
        "heads": {task.head: task.num_outputs for task in tasks},
        "compute_dtype": "float32",
    }
    config = EncoderConfig(transformer, **(defaults | fields))
    rng = np.random.default_rng(0)
    parameters = jax.tree.map(
        lambda leaf: jax.numpy.asarray(0.2 * rng.standard_normal(leaf.shape), leaf.dtype),
        abstract_encoder(config).shapes,
    )
    spec = InferenceSpec(config, tasks, Tokenizer.load("small"), 48, 128, "right", 7)
    return Predictor(spec, parameters)


TINY = {
    "num_layers": 4,
    "embed_dim": 16,
    "hidden_dim": 24,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 8,
    "query_scale": 8**-0.5,
    "sliding_window": 8,
}
TRANSFORMERS = {
    family: dataclasses.replace(GEMMA_CONFIGS[f"{family}_tiny"], **TINY)
    for family in ("gemma2", "gemma3")
}
TEXTS = ["a fine film", "a very long text that says nothing " * 4, "żółć 日本語 🎬", "x"]


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("gemma2", {}),
        ("gemma3", {"heads": {"t": HeadConfig(2, hidden_dims=(12, 6))}}),
        ("gemma3", {"attention": "causal", "pooling": PoolingConfig("last_k")}),
        ("gemma2", {"pooling": PoolingConfig("first_k", projection=(20, 8), normalize=True)}),
    ],
)
def test_exporting_and_loading_is_the_identity(tmp_path, family, fields):
    """Parameters, spec and predictions are equal to the bit, also after a second export."""
    predictor = make_predictor(TRANSFORMERS[family], **fields)
    for folder in ("once", "twice"):
        again = Predictor.load(export_huggingface(predictor, tmp_path / folder))
        assert again.spec.description() == predictor.spec.description()
        assert (
            parameter_paths(again.parameters).keys() == parameter_paths(predictor.parameters).keys()
        )
        jax.tree.map(np.testing.assert_array_equal, again.parameters, predictor.parameters)
        if folder == "once" and predictor.spec.encoder.heads["t"].hidden_dims:
            np.testing.assert_array_equal(again.predict(TEXTS), predictor.predict(TEXTS))
        predictor = again


def test_an_export_without_our_own_file_is_the_same_model(tmp_path, monkeypatch):
    """Loads config.json alone, as transformers does, and tensors in several files."""
    monkeypatch.setattr(export, "MAX_FILE", 100_000)
    for family, transformer in TRANSFORMERS.items():
        for attention in ("bidirectional", "causal"):
            predictor = make_predictor(transformer, attention=attention)
            folder = export_huggingface(predictor, tmp_path / family / attention)
            (folder / "gemma_encoder.json").unlink()
            (folder / digests.NAME).unlink()
            assert len(list(folder.glob("model-*.safetensors"))) > 1
            backbone = weights.load_backbone(folder)
            for kind in ("local", "global"):
                actual = backbone.config.attention_spec(kind, attention)
                assert actual == transformer.attention_spec(kind, attention)
            window = backbone.config.sliding_window  # may differ, with the same reach
            expected = dataclasses.replace(transformer, sliding_window=window)
            assert weights.transformer_differences(backbone.config, expected) == []
            parameters = parameter_dict(nnx.state(backbone))
            jax.tree.map(
                np.testing.assert_array_equal, parameters, predictor.parameters["backbone"]
            )


@pytest.mark.parametrize("case", CASES)
def test_an_export_has_the_fields_that_transformers_wrote(case):
    """For every golden folder, the fields that determine the outputs are equal."""
    theirs = json.loads((GOLDENS / case / "config.json").read_text())
    theirs = theirs.get("text_config") or theirs.get("encoder") or theirs
    config = weights.open_checkpoint(GOLDENS / case).config()
    attention = "bidirectional" if config.bidirectional_reach else "causal"
    ours = export.transformer_json(EncoderConfig(config, attention=attention))
    if case == "t5gemma":  # its encoder is Gemma 2's transformer, always bidirectional
        theirs |= {"model_type": "gemma2", "is_causal": False}
    for name in (
        "model_type",
        "layer_types",
        "sliding_window",
        "query_pre_attn_scalar",
        "attn_logit_softcapping",
        "rope_parameters",
        "head_dim",
        "vocab_size",
    ):
        assert ours[name] == theirs[name], name
    for switch in ("is_causal", "use_bidirectional_attention"):
        assert bool(ours.get(switch)) == bool(theirs.get(switch))
    # Where transformers wrote is_causal, the export has it too.
    assert ("is_causal" in ours) >= (theirs.get("is_causal") is not None)


def test_heads_are_left_out_on_request(tmp_path):
    predictor = make_predictor(TRANSFORMERS["gemma3"])
    folder = export_huggingface(predictor, tmp_path / "bare", heads=False)
    modules = json.loads((folder / "modules.json").read_text())
    kinds = [module["type"].rpartition(".")[2] for module in modules]
    assert kinds == ["Transformer", "Pooling"]
    again = Predictor.load(folder)
    assert not again.tasks
    assert "heads" not in again.parameters
    jax.tree.map(
        np.testing.assert_array_equal,
        again.parameters["backbone"],
        predictor.parameters["backbone"],
    )


@pytest.mark.parametrize(
    ("family", "changes", "fields", "message"),
    [
        (
            "gemma3",
            {},
            {"pooling": PoolingConfig("attention_query", heads=2)},
            "no pooler like 'attention_query'; expected one of mean, first_k, last_k",
        ),
        (
            "gemma3",
            {},
            {"pooling": PoolingConfig("last_k", k=3)},
            "last_k pooling takes one state, not 3",
        ),
        (
            "gemma3",
            {},
            {"heads": {"a": 1, "b": 1}},
            r"the format has one head, the encoder 2 \(a, b\); heads=False leaves them out",
        ),
        (
            "gemma3",
            {"bidirectional_reach": (3, 2)},
            {},
            "reach 3 tokens to the left and 2 to the right",
        ),
        ("gemma2", {"bidirectional_reach": (0, 0)}, {}, "attends to its own token only"),
        ("gemma2", {"global_rope_scale": 8.0}, {}, "one rotary base and no scaling"),
        (
            "gemma2",
            {"num_heads": 3},
            {},
            "a multiple of the number of query heads, got width 16 and 3 heads",
        ),
    ],
)
def test_models_that_the_format_cannot_represent_are_refused(
    tmp_path, family, changes, fields, message
):
    predictor = make_predictor(dataclasses.replace(TRANSFORMERS[family], **changes))
    predictor.spec = dataclasses.replace(
        predictor.spec, encoder=dataclasses.replace(predictor.spec.encoder, **fields)
    )
    with pytest.raises(InputError, match=f"cannot be exported: .*{message}"):
        export_huggingface(predictor, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_empty_is_left_unchanged(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="is not empty; name a new folder"):
        export_huggingface(make_predictor(TRANSFORMERS["gemma3"]), tmp_path)


def exported_scores(folder, embeddings):
    """Returns "scores" of an export's head for embeddings, as its Dense modules compute them."""
    outputs = {"sentence_embedding": embeddings}
    for module in json.loads((folder / "modules.json").read_text()):
        path = folder / module["path"]
        settings = json.loads((path / "config.json").read_text()) if module["path"] else {}
        if "module_output_name" in settings:
            tensors = safetensors.numpy.load_file(path / "model.safetensors")
            x = outputs[settings["module_input_name"]]
            x = x @ tensors["linear.weight"].T + tensors["linear.bias"]
            if settings["activation_function"].endswith("GELU"):
                x = np.asarray(jax.nn.gelu(x, approximate=False))
            outputs[settings["module_output_name"]] = x
    return outputs["scores"]


UNIT_TASKS = {
    "regression": {"label_range": (1.0, 5.0)},
    "ranking": {},
    "choice": {},
    "classification": {"classes": ("a", "b", "c")},
    "multi_label": {"classes": ("a", "b", "c")},
    "ordinal": {"classes": ("a", "b", "c")},
}


@pytest.mark.parametrize("hidden_dims", [(), (12,)])
@pytest.mark.parametrize("kind", UNIT_TASKS)
def test_scores_of_an_export_are_on_the_scale_of_predict(tmp_path, kind, hidden_dims):
    """A number is the prediction itself; outputs of classes are so after the kind's function."""
    task = Task("t", kind, Template("{text}"), **UNIT_TASKS[kind])
    predictor = make_predictor(
        TRANSFORMERS["gemma3"],
        classes=None,
        heads={"t": HeadConfig(task.num_outputs, hidden_dims=hidden_dims)},
    )
    predictor = Predictor(dataclasses.replace(predictor.spec, tasks=(task,)), predictor.parameters)
    folder = export_huggingface(predictor, tmp_path / "out")
    scores = exported_scores(folder, predictor.embed(TEXTS))
    expected = predictor.predict(TEXTS)
    if kind in ("regression", "ranking", "choice"):
        np.testing.assert_allclose(scores[:, 0], expected, rtol=1e-4, atol=1e-4)
    else:
        actual = task.kind.postprocess(task, scores)
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)
    again = Predictor.load(folder)
    np.testing.assert_array_equal(again.predict(TEXTS), expected)
    jax.tree.map(np.testing.assert_array_equal, again.parameters, predictor.parameters)
    assert task.kind.score_meaning in (folder / "README.md").read_text()


def test_an_export_of_an_earlier_version_is_read(tmp_path):
    """Formerly the last layer of a regression was stored on the scale of [0, 1] only."""
    task = Task("t", "regression", Template("{text}"), label_range=(0.0, 5.0))
    predictor = make_predictor(TRANSFORMERS["gemma3"], classes=None, heads={"t": 1})
    predictor = Predictor(dataclasses.replace(predictor.spec, tasks=(task,)), predictor.parameters)
    folder = export_huggingface(predictor, tmp_path / "out")
    (unscaled,) = folder.glob("*/unscaled.safetensors")
    unscaled.replace(unscaled.with_name("model.safetensors"))
    (folder / digests.NAME).unlink()
    np.testing.assert_array_equal(Predictor.load(folder).predict(TEXTS), predictor.predict(TEXTS))


def test_tasks_of_one_head_with_different_units_are_refused(tmp_path):
    tasks = tuple(
        Task(name, "regression", Template("{text}"), label_range=(0.0, high), head="h")
        for name, high in (("stars", 5.0), ("percent", 100.0))
    )
    predictor = make_predictor(TRANSFORMERS["gemma3"], classes=None, heads={"h": 1})
    predictor.spec = dataclasses.replace(predictor.spec, tasks=tasks)
    with pytest.raises(InputError, match="tasks stars and percent share the head 'h', but"):
        export_huggingface(predictor, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    export_huggingface(predictor, tmp_path / "bare", heads=False)


@pytest.mark.parametrize("kind", ["classification", "multi_label", "ordinal"])
def test_exported_scores_are_divided_by_the_temperature(tmp_path, kind):
    """Loading the export gives the same calibrated bits: the undivided layer is stored beside."""
    fitted = Calibration(2.5, (0.6,) * 50, "validation", 200, 7)
    task = Task("t", kind, Template("{text}"), classes=("a", "b", "c"), calibration=fitted)
    plain = make_predictor(TRANSFORMERS["gemma3"], classes=None, heads={"t": task.num_outputs})
    predictor = Predictor(dataclasses.replace(plain.spec, tasks=(task,)), plain.parameters)
    folder = export_huggingface(predictor, tmp_path / "out")
    again = Predictor.load(folder)
    np.testing.assert_array_equal(again.predict(TEXTS), predictor.predict(TEXTS))
    assert again.tasks["t"] == task
    if task.num_outputs == len(task.classes):
        scores = exported_scores(folder, predictor.embed(TEXTS))
        at_1 = task.uncalibrated()
        np.testing.assert_allclose(
            task.kind.postprocess(at_1, scores), predictor.predict(TEXTS), rtol=1e-4, atol=1e-4
        )
    else:  # of cumulative logits only `predict` computes probabilities
        assert not list(folder.glob("*/unscaled.safetensors"))


def test_an_uncalibrated_task_shares_the_temperature_of_a_head(tmp_path):
    fitted = Calibration(2.5, (), "validation", 200, 7)
    task = Task("t", "classification", Template("{text}"), classes=("a", "b"), head="t")
    tasks = (dataclasses.replace(task, calibration=fitted), dataclasses.replace(task, name="u"))
    assert output_scale("t", tasks) == (1 / 2.5, 0.0)
    other = dataclasses.replace(fitted, temperature=2.0)
    tasks = (tasks[0], dataclasses.replace(tasks[1], calibration=other))
    with pytest.raises(InputError, match="tasks t and u share the head 't', but"):
        output_scale("t", tasks)
