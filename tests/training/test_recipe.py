"""What a config means, and every refusal of a config."""

import importlib

import pytest

from gemma_encoder.inputs.errors import InputError
from gemma_encoder.training import recipe
from gemma_encoder.training.recipe import Duration


@pytest.fixture
def config(changed):
    """`config(**changes)`: the quickstart's config, changed."""
    return lambda **changes: changed(
        importlib.import_module("gemma_encoder.experiments.quickstart").get_config(), changes
    )


def test_the_quickstart_builds(config):
    built = recipe.build(config())
    assert [task.kind for task in built.tasks] == ["classification", "regression", "ranking"]
    assert built.encoder.heads == {"toy_sentiment": 2, "toy_similarity": 1, "toy_ranking": 1}
    assert built.losses.list_size == 10 and built.stream.shape.groups >= 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"tasks": ("toy_sentimant",)},
            "unknown task 'toy_sentimant'; did you mean 'toy_sentiment'",
        ),
        ({"tasks": ()}, "at least one task"),
        ({"tasks": ("toy_ranking", "toy_ranking")}, "none twice"),
        ({"model__size": "gemma2_2c"}, "unknown size 'gemma2_2c'; did you mean 'gemma2_2b'"),
        ({"model__pooling__name": "meen"}, "unknown pooler 'meen'; did you mean 'mean'"),
        ({"model__attention": "bidirectionel"}, "did you mean 'bidirectional'"),
        ({"model__compute_dtype": "float16"}, "float16 is refused"),
        ({"losses__ranking": "poly"}, "unknown ranking loss 'poly'; did you mean 'poly1'"),
        ({"batch__padding": "middle"}, "padding must be 'left' or 'right'"),
        ({"batch__rows": 0}, "rows must be at least 1"),
        ({"batch__readers": 3}, "cannot share"),
        ({"batch__examples_per_step": -1}, "examples_per_step"),
        ({"tokenizer": "nowhere.model"}, "tokenizer 'nowhere.model' cannot be read"),
        ({"train_for": "many"}, "train_for='many' is no duration"),
        ({"train_for": "3 fortnights"}, "unknown unit in train_for='3 fortnights'"),
        ({"model__size": "gemma2_2b", "tokenizer": "small", "model__pooling__k": 0}, "pooling.k"),
        ({"task_weights": {"glue_colla": 1.0}}, "unknown task in task_weights"),
        ({"tasks": ("own",)}, "own.train is not set"),
        ({"tasks": ("msmarco",), "ranking__run": "nowhere.{split}"}, "MSMARCO_DIR"),
    ],
)
def test_refusals_name_what_is_wrong(config, changes, message):
    with pytest.raises(InputError, match=message):
        recipe.build(config(**changes))


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("40 steps", 40),
        ("40", 40),
        (40, 40),
        ("2 epochs", 50),
        ("1 epoch", 25),
        ("0.5 epochs", 12),
        ("800 examples", 20),
        ("10 percent", 8),
        ("1e2 steps", 100),
        ("0", 0),
    ],
)
def test_durations(text, steps):
    assert Duration.parse(text, "f").steps(examples_per_step=40, epoch=1000, total=80) == steps


def test_train_for_cannot_be_a_share_of_itself():
    with pytest.raises(InputError, match="percent"):
        Duration.parse("10 percent", "train_for").steps(40, 1000)


def test_arguments_of_a_config_file():
    assert recipe.parse_arg("sst2,size=gemma2_2b,smoke", ("sst2",)) == (
        "sst2",
        {"size": "gemma2_2b"},
        True,
    )
    assert recipe.parse_arg("") == ("", {}, False)
    with pytest.raises(InputError, match="did you mean 'smoke'"):
        recipe.parse_arg("smokey")
    with pytest.raises(InputError, match="did you mean 'size'"):
        recipe.parse_arg("sise=tiny")


@pytest.mark.parametrize("name", ["quickstart", "glue", "superglue", "multitask", "msmarco", "own"])
@pytest.mark.parametrize("arg", ["", "smoke", "size=gemma2_9b", "size=gemma2_tiny,smoke"])
def test_every_experiment_takes_its_arguments(name, arg):
    values = importlib.import_module(f"gemma_encoder.experiments.{name}").get_config(arg)
    assert set(values) == set(recipe.default_config())
    with pytest.raises(InputError, match="did you mean 'gemma2_9b'"):
        importlib.import_module(f"gemma_encoder.experiments.{name}").get_config("size=gemma2_9")


def test_differences_name_fields_and_leave_out_what_may_change():
    before = {"seed": 0, "optimizer": {"learning_rate": 0.1, "b1": 0.9}, "log_every": "1"}
    after = {"seed": 0, "optimizer": {"learning_rate": 0.2, "b1": 0.9}, "log_every": "5"}
    assert recipe.differences(before, after) == ["optimizer.learning_rate: 0.1 -> 0.2"]


def test_a_dry_recipe_needs_neither_data_nor_weights(monkeypatch, tmp_path):
    from gemma_encoder.experiments import glue

    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    config = glue.get_config("mnli,size=gemma2_9b")
    config.model.pretrained = "GEMMA2_9B_PT"
    built = recipe.build(config, dry=True)
    assert built.encoder.transformer.num_layers == 42 and built.losses.examples_per_step > 0
    config.model.size = "pretrained"
    with pytest.raises(InputError, match="else name a size"):
        recipe.build(config, dry=True)
