"""Durations: every accepted notation, and every error."""

import pytest

from gemma_encoder.inputs.errors import InputError
from gemma_encoder.training.durations import Duration


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("40 steps", 40),
        ("40", 40),
        (40, 40),
        ("2 epochs", 50),
        ("1 epoch", 25),
        ("0.5 epochs", 12),
        (".5 epochs", 12),
        ("3 Epochs", 75),
        ("2EPOCHS", 50),
        ("800 examples", 20),
        ("1 Example", 1),
        ("10 percent", 8),
        ("1 percent", 1),
        ("10%", 8),
        (" 12.5 % ", 10),
        ("1e2 steps", 100),
        ("1E2", 100),
        ("5e-1 epochs", 12),
        ("0", 0),
        ("0%", 0),
    ],
)
def test_durations(text, steps):
    assert Duration.parse(text, "f").steps(examples_per_step=40, epoch=1000, total=80) == steps


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "many",
            "train_for='many' is not a duration; write a number of at least 0 and one of steps",
        ),
        ("", "train_for='' is not a duration"),
        ("nan", "train_for='nan' is not a duration"),
        ("inf steps", "train_for='inf steps' is not a duration"),
        ("-3 epochs", "train_for='-3 epochs' is not a duration; write a number of at least 0"),
        (-3, "train_for=-3 is not a duration"),
        (". epochs", "train_for='. epochs' is not a duration"),
        ("3 4 steps", "train_for='3 4 steps' is not a duration"),
        ("1e400 steps", "train_for='1e400 steps' is longer than any training"),
        ("9e15", "train_for='9e15' is longer than any training"),
        ("3 fortnights", "unknown unit in train_for='3 fortnights' 'fortnights'"),
        ("3 epoks", "did you mean 'epochs'"),
        ("3 %%", "train_for='3 %%' is not a duration"),
    ],
)
def test_an_invalid_duration_is_refused_in_one_line(text, message):
    with pytest.raises(InputError) as error:
        Duration.parse(text, "train_for")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_train_for_cannot_be_in_percent():
    with pytest.raises(InputError, match="percent"):
        Duration.parse("10%", "train_for").steps(40, 1000)
