"""Building a recipe from a config, and every error of an invalid config."""

import importlib
import sys

import pytest

from gemma_encoder.inputs.errors import InputError
from gemma_encoder.training.build import build
from gemma_encoder.training.config import TrainConfig


@pytest.fixture
def config(changed):
    """`config(**changes)`: the quickstart's config with changed fields."""
    quickstart = importlib.import_module("gemma_encoder.experiments.quickstart")
    return lambda **changes: changed(quickstart.get_config(), changes)


def test_the_quickstart_builds(config):
    built = build(config())
    assert [task.kind.name for task in built.tasks] == ["classification", "regression", "ranking"]
    widths = {name: head.outputs for name, head in built.encoder.heads.items()}
    assert widths == {"toy_sentiment": 2, "toy_similarity": 1, "toy_ranking": 1}
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
        ({"train_for": "many"}, "train_for='many' is not a duration"),
        ({"train_for": "3 fortnights"}, "unknown unit in train_for='3 fortnights'"),
        ({"model__size": "gemma2_2b", "tokenizer": "small", "model__pooling__k": 0}, "pooling.k"),
        ({"task_weights": {"glue_colla": 1.0}}, "unknown task in task_weights"),
        ({"tasks": ("own",)}, "own.train is not set"),
        ({"tasks": ("msmarco",), "ranking__run": "nowhere.{split}"}, "MSMARCO_DIR"),
    ],
)
def test_an_invalid_config_is_refused_with_its_reason(config, changes, message):
    with pytest.raises(InputError, match=message):
        build(config(**changes))


def test_a_dry_recipe_needs_neither_data_nor_weights(monkeypatch, tmp_path):
    from gemma_encoder.experiments import glue

    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    config = glue.get_config("mnli,size=gemma2_9b")
    config.model.pretrained = "GEMMA2_9B_PT"
    built = build(config, dry=True)
    assert built.encoder.transformer.num_layers == 42 and built.losses.examples_per_step > 0
    config.model.size = "pretrained"
    with pytest.raises(InputError, match="or name a size"):
        build(config, dry=True)


def test_a_typed_config_builds_the_same(config):
    typed = TrainConfig.from_config_dict(config())
    from_dict = build(config(), dry=True)
    from_typed = build(typed, dry=True)
    assert from_dict.config == from_typed.config == typed
    assert from_dict.encoder == from_typed.encoder
    assert from_dict.stream == from_typed.stream
    assert from_dict.losses == from_typed.losses


def test_fields_of_the_transformer_replace_those_of_the_size(config):
    fields = {"num_layers": 2, "embed_dim": 32, "head_dim": 8}
    transformer = build(config(model__transformer=fields)).encoder.transformer
    plain = build(config(), dry=True).encoder.transformer
    assert (transformer.num_layers, transformer.embed_dim, transformer.head_dim) == (2, 32, 8)
    assert (transformer.hidden_dim, transformer.pattern) == (plain.hidden_dim, plain.pattern)
    with pytest.raises(InputError, match="num_layers must be at least 1, got 0"):
        build(config(model__transformer={"num_layers": 0}))


def test_modules_are_imported_before_names_are_looked_up(config, tmp_path, monkeypatch):
    """A config may name a task that one of its modules registers."""
    from gemma_encoder.data import registry

    (tmp_path / "task_of_mine.py").write_text(
        "from gemma_encoder.data import registry\n"
        "from gemma_encoder.data.tasks import toy\n"
        "registry.register('sentiment_of_mine', toy.TASKS['toy_sentiment'])\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_TASKS", dict(registry._TASKS))
    mine = config(tasks=("sentiment_of_mine",))
    with pytest.raises(InputError, match="unknown task"):
        build(mine)
    mine.modules = ("task_of_mine",)
    assert [source.options.list_size for source in build(mine).sources] == [10]
    assert "task_of_mine" in sys.modules
    with pytest.raises(InputError, match="modules: 'nowhere_at_all' cannot be imported"):
        build(config(modules=("nowhere_at_all",)))


def test_a_list_larger_than_a_block_is_refused(micro):
    config = micro(ranking__list_size=17)  # a block has 8 rows of 4 segments / 2 micro-batches
    config.batch.micro_batches = 2
    with pytest.raises(InputError, match="lists of 17 texts .* do not fit in a block of 4 rows"):
        build(config)
    config.ranking.list_size = 16
    assert build(config).stream.shape.list_size == 16


NAN, INFINITE = float("nan"), float("inf")
OUT_OF_RANGE = {
    "optimizer__learning_rate": (-1.0, NAN, INFINITE),
    "optimizer__b1": (-0.1, 1.0, NAN),
    "optimizer__b2": (-0.1, 1.0, NAN),
    "optimizer__epsilon": (0.0, -1.0, NAN, INFINITE),
    "optimizer__weight_decay": (-1.0, NAN),
    "optimizer__clip_norm": (-1.0, NAN),
    "optimizer__multipliers": (((".*", -1.0),), ((".*", NAN),)),
    "optimizer__layer_decay": (0.0, 1.5, NAN),
    "mixture__temperature": (0.0, -1.0, NAN, INFINITE),
    "keep_checkpoints": (0, -1),
    "batch__rows": (0, -8),
    "batch__row_length": (0, -1),
    "batch__segments": (0, -1),
    "batch__micro_batches": (0, -1),
    "batch__readers": (0, -1),
    "batch__examples_per_step": (-1,),
    "ranking__list_size": (0, 1, -1),
    "ranking__negative_ranks": ((5, 1), (0, 0), (-1, 5)),
    "model__attention_dropout": (-0.1, 1.0, NAN),
    "model__feed_forward_dropout": (-0.1, 1.0, NAN),
    "model__lora__alpha": (0.0, -1.0, NAN, INFINITE),
    "max_length": (0, -1),
    "early_stopping__patience": (-1,),
    "early_stopping__min_delta": (-1.0, NAN),
}


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field in OUT_OF_RANGE for value in OUT_OF_RANGE[field]]
)
def test_a_number_out_of_range_is_refused_by_its_name(micro, field, value):
    last = field.split("__")[-1]
    with pytest.raises(InputError, match=last) as error:
        build(micro(**{field: value}))
    assert "\n" not in str(error.value)
