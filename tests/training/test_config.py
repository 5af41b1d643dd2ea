"""The typed config: conversion from and to a ConfigDict, help lines, and errors of fields."""

import copy
import dataclasses
import json
import pickle
import subprocess
import sys

import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags

from gemma_encoder import configs
from gemma_encoder.cli import commandline
from gemma_encoder.inputs import options
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.model import config as model_config
from gemma_encoder.model.config import PoolingConfig
from gemma_encoder.training.config import (
    MAY_CHANGE,
    EarlyStoppingConfig,
    TrainConfig,
    config_help,
    default_config,
    import_modules,
    warn_of_former_name,
)


def with_fields(**fields) -> ConfigDict:
    """Returns the default config with fields set by path ("batch__rows"), without type checks."""
    config = default_config()
    with config.ignore_type():
        for path, value in fields.items():
            *parents, name = path.split("__")
            node = config
            for parent in parents:
                node = node[parent]
            node[name] = value
    return config


def nested(value):
    """Yields options and all options nested in them."""
    yield value
    for field in dataclasses.fields(value):
        inner = getattr(value, field.name)
        if dataclasses.is_dataclass(inner):
            yield from nested(inner)


def test_every_field_has_a_line_of_help():
    for group in nested(TrainConfig()):
        for field in dataclasses.fields(group):
            text = field.metadata.get("help", "")
            assert text.strip() and "\n" not in text, f"{type(group).__name__}.{field.name}"


def test_the_help_names_each_field_with_type_and_default():
    lines = config_help()
    assert "batch.rows (int, 16): rows of a global batch" in lines
    assert any(line.startswith("tasks (tuple[str, ...], ('glue_sst2',)): ") for line in lines)
    assert any(line.startswith("task_weights (Mapping[str, float], {}): ") for line in lines)
    count = sum(
        not dataclasses.is_dataclass(getattr(group, field.name))
        for group in nested(TrainConfig())
        for field in dataclasses.fields(group)
    )
    assert len(lines) == count and not any("\n" in line for line in lines)


def test_config_dict_and_typed_config_convert_into_each_other():
    assert TrainConfig.from_config_dict(default_config()) == TrainConfig()
    config = with_fields(
        tasks=["toy_sentiment"],
        task_weights={"toy_sentiment": 2},
        optimizer__multipliers=[["embedding", 1]],
        model__pooling__projection=[8, 4],
        losses={"ranking": "poly1"},
        early_stopping={"patience": 3},
        train_for=40,
    )
    typed = TrainConfig.from_config_dict(config)
    assert typed.tasks == ("toy_sentiment",) and typed.task_weights == {"toy_sentiment": 2.0}
    assert typed.optimizer.multipliers == (("embedding", 1.0),)
    assert isinstance(typed.optimizer.multipliers[0][1], float)
    assert typed.model.pooling == PoolingConfig(projection=(8, 4))
    assert typed.losses == TrainConfig().losses | {"ranking": "poly1"}
    assert typed.early_stopping == EarlyStoppingConfig(3) and typed.train_for == 40
    assert options.from_mapping(TrainConfig, json.loads(json.dumps(typed.to_dict()))) == typed


FORMER_NAMES = {
    "max_train": "max_train_examples",
    "max_eval": "max_eval_examples",
    "model.head_hidden": "model.head_hidden_dims",
    "own.cut": "own.truncation",
}


def old_style(config: ConfigDict) -> ConfigDict:
    """Sets the fields of a config by their former names, as a file written before does."""
    config.max_train = 5
    config["max_eval"] = 6
    config.update({"model": {"head_hidden": (8,)}})
    config.own.cut = ("body",)
    return config


@pytest.mark.parametrize(
    "copied",
    [
        lambda config: config,
        copy.deepcopy,
        ConfigDict,
        lambda config: config.copy_and_resolve_references(),
        lambda config: pickle.loads(pickle.dumps(config)),
        lambda config: ConfigDict(config.to_dict()),
    ],
    ids=("same", "deepcopy", "ConfigDict", "resolved", "pickled", "dict"),
)
def test_former_names_of_fields_are_accepted(copied):
    typed = TrainConfig.from_config_dict(copied(old_style(default_config())))
    assert (typed.max_train_examples, typed.max_eval_examples) == (5, 6)
    assert (typed.model.head_hidden_dims, typed.own.truncation) == ((8,), ("body",))
    assert "max_train" not in typed.to_dict()


def test_former_names_are_accepted_as_overrides_and_flags():
    config = default_config()
    configs.override(config, {"max_train": 5, "own.cut": ("body",)})
    typed = TrainConfig.from_config_dict(config)
    assert (typed.max_train_examples, typed.own.truncation) == (5, ("body",))
    words = [f"--config.{former}=1" for former in FORMER_NAMES]
    expected = [f"--config.{current}=1" for current in FORMER_NAMES.values()]
    assert commandline.checked_fields([*words, "--workdir=w"]) == [*expected, "--workdir=w"]


def test_a_former_name_warns_once_with_the_new_one(caplog):
    warn_of_former_name.cache_clear()
    for _ in range(2):
        TrainConfig.from_config_dict(old_style(default_config()))
    for former, current in FORMER_NAMES.items():
        assert caplog.text.count(f"config field {former} is now {current};") == 1


def test_two_names_with_two_values_are_refused():
    config = old_style(default_config())
    config.max_train_examples = 5
    assert TrainConfig.from_config_dict(config).max_train_examples == 5
    config.max_train_examples = 7
    with pytest.raises(InputError, match="max_train_examples is also given by its former name"):
        TrainConfig.from_config_dict(config)


def test_references_between_fields_are_resolved():
    config = default_config()
    config.batch.row_length = config.get_ref("max_length")
    config.max_length = 64
    assert TrainConfig.from_config_dict(config).batch.row_length == 64


def test_mappings_are_set_in_a_file_and_on_the_command_line():
    config = default_config()
    config.model.transformer = {"num_layers": 3, "embed_dim": 64}
    config.model.transformer = {"num_layers": 2, "pattern": ["local", "global"]}
    typed = TrainConfig.from_config_dict(config)
    assert typed.model.transformer == {"num_layers": 2, "pattern": ("local", "global")}
    argv = ["main", "--config.model.transformer={'num_layers': 4, 'final_soft_cap': None}"]
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_dict(
        "config", default_config(), flag_values=values, sys_argv=argv
    )
    values(argv)
    typed = TrainConfig.from_config_dict(holder.value)
    assert typed.model.transformer == {"num_layers": 4, "final_soft_cap": None}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"trian_for": "1 steps"}, "unknown config field 'trian_for'; did you mean 'train_for'"),
        (
            {"model__pooling__projektion": ()},
            "unknown config field 'model.pooling.projektion'; did you mean 'model.pooling.projec",
        ),
        (
            {"model__transformer": {"num_layer": 2}},
            "unknown config field 'model.transformer.num_layer'; "
            "did you mean 'model.transformer.num_l",
        ),
        (
            {"model__transformer": {"num_layers": "2"}},
            "model.transformer.num_layers must be a whole number, got '2'",
        ),
        (
            {"model__transformer": {"final_soft_cap": "30"}},
            "model.transformer.final_soft_cap must be a number or None, got '30'",
        ),
        ({"tasks": "toy_sentiment"}, "tasks must be a list of values, each text, got 'toy_sent"),
        ({"tasks": (1,)}, "tasks[0] must be text, got 1"),
        ({"max_length": 128.5}, "max_length must be a whole number, got 128.5"),
        ({"max_length": True}, "max_length must be a whole number, got True"),
        ({"model__pooling__normalize": 1}, "model.pooling.normalize must be True or False, got 1"),
        ({"optimizer__b1": "high"}, "optimizer.b1 must be a number, got 'high'"),
        ({"mesh": (1, 2)}, "mesh must be a list of 3 values, each a whole number, got (1, 2)"),
        ({"task_weights": {"a": "b"}}, "task_weights.a must be a number, got 'b'"),
        ({"train_for": None}, "train_for must be text or a whole number, got None"),
        ({"own": "train.csv"}, "own must be a mapping from field to value, got 'train.csv'"),
        ({"own__classes": (0, 1)}, "own.classes[0] must be text, got 0"),
        ({"early_stopping__patience": -1}, "early_stopping.patience must be at least 0, got -1"),
        ({"early_stopping__min_delta": -0.5}, "early_stopping.min_delta must be at least 0"),
    ],
)
def test_an_invalid_field_is_refused_in_one_line(fields, message):
    with pytest.raises(InputError) as error:
        TrainConfig.from_config_dict(with_fields(**fields))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_fields_that_may_change_between_starts():
    assert MAY_CHANGE == (
        "log_every",
        "evaluate_every",
        "checkpoint_every",
        "keep_checkpoints",
        "best_metric",
        "early_stopping",
        "profile",
        "compilation_cache",
        "mesh",
        "modules",
        "hooks",
    )


def test_a_module_that_is_missing_is_one_line(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="modules: 'no_such_module' cannot be imported: No module"):
        import_modules(("json", "no_such_module"))
    (tmp_path / "module_of_mine.py").write_text("LOADED = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    import_modules(("module_of_mine",))
    assert sys.modules["module_of_mine"].LOADED
    (tmp_path / "broken_module.py").write_text("x = 1\nlen(x)\n")
    with pytest.raises(
        InputError, match=r"imported \(.*broken_module.py:2\): TypeError: object of"
    ):
        import_modules(("broken_module",))


def test_modules_are_imported_before_the_fields_are_checked(tmp_path, monkeypatch):
    """A config may name a pooler that a module registers, but only with the module."""
    (tmp_path / "pooler_module.py").write_text(
        "from gemma_encoder.model import config\nconfig.POOLERS.append('pooler_of_mine')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(model_config, "POOLERS", list(model_config.POOLERS))
    config = default_config()
    config.model.pooling.name = "pooler_of_mine"
    with pytest.raises(InputError, match="unknown pooler 'pooler_of_mine'"):
        TrainConfig.from_config_dict(config)
    config.modules = ("pooler_module",)
    assert TrainConfig.from_config_dict(config).model.pooling.name == "pooler_of_mine"
    with config.ignore_type():
        config.modules = "pooler_module"
    with pytest.raises(InputError, match="modules must be a list of values, each text"):
        TrainConfig.from_config_dict(config)


def test_a_config_is_read_without_jax_and_tensorflow():
    """So `--help` and config errors are fast."""
    program = (
        "import sys\n"
        "from gemma_encoder.training import config, recipe\n"
        "config.config_help(), recipe.default_config()\n"
        "import gemma_encoder.experiments.own\n"
        "own = gemma_encoder.experiments.own.get_config('classification')\n"
        "typed = config.TrainConfig.from_config_dict(own)\n"
        "print([name for name in ('jax', 'tensorflow', 'optax', 'flax', 'seqio', 'pyarrow')"
        " if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr


def test_modules_are_imported_from_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "module_of_this_folder.py").write_text("")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    import_modules(("module_of_this_folder",))
    assert "module_of_this_folder" in sys.modules


NUMBERS = [
    (*entry.name.split("."),)
    for entry in options.field_help(TrainConfig())
    if isinstance(entry.default, float)
]


@pytest.mark.parametrize("path", [*NUMBERS, ("model", "transformer", "query_scale")], ids=".".join)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_is_refused(path, value):
    """JSON, in which a run stores its config, has no such number."""
    values = value
    for name in reversed(path):
        values = {name: values}
    with pytest.raises(InputError, match=rf"\b{path[-1]}\b"):
        options.from_mapping(TrainConfig, values)
