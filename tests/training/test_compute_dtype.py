"""The compute dtype "auto": chosen for the machine, kept by a run, and said once."""

import shutil

import pytest

import gemma_encoder as ge
from gemma_encoder import cli
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.model import processor
from gemma_encoder.training import loop, recipe
from gemma_encoder.training.build import build
from gemma_encoder.training.metrics_log import read_metrics
from gemma_encoder.training.workdir import check_run
from gemma_encoder.weights import native

FIELDS = {
    "tasks": ("toy_sentiment",),
    "max_eval_examples": 8,
    "train_for": "4 steps",
    "log_every": "1 steps",
    "checkpoint_every": "2 steps",
    "evaluate_every": "4 steps",
    "model__compute_dtype": "auto",
}
SLOW = "bfloat16 is slower than float32 here: no fast bfloat16"
FEATURES = {"fast": frozenset({"avx512_bf16"}), "slow": frozenset({"avx2"})}
TEXTS = ["a fine film .", "a dull one ."]


@pytest.fixture
def machine(monkeypatch):
    """`machine("fast" | "slow")`: as in a new process on a CPU that is so at bfloat16."""

    def become(speed):
        monkeypatch.setattr(processor, "features", lambda: FEATURES[speed])
        monkeypatch.setattr(processor, "_reported", [])

    become("fast")
    return become


@pytest.fixture(scope="module")
def trained(micro, tmp_path_factory):
    """A workdir that computes in bfloat16, chosen by "auto" on a fast CPU."""
    workdir = tmp_path_factory.mktemp("auto")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processor, "features", lambda: FEATURES["fast"])
        loop.train(micro(**FIELDS), workdir)
    return workdir


@pytest.fixture
def workdir(trained, tmp_path):
    """A copy of `trained`."""
    return shutil.copytree(trained, tmp_path / "run")


def stored_dtype(workdir):
    return native.load_inference_spec(native.find(workdir)).encoder.compute_dtype


def losses(workdir):
    return [line["loss"] for line in read_metrics(workdir) if line["split"] == "train"]


@pytest.mark.parametrize(
    ("speed", "platform", "expected"),
    [
        ("fast", "cpu", "bfloat16"),
        ("slow", "cpu", "float32"),
        ("slow", None, "float32"),  # that of JAX here
        ("slow", "gpu", "bfloat16"),
        ("slow", "tpu", "bfloat16"),
    ],
)
def test_auto_is_resolved_for_the_platform(speed, platform, expected, machine, micro):
    machine(speed)
    built = build(micro(**FIELDS), dry=True, platform=platform)
    assert built.encoder.compute_dtype == expected
    assert built.config.model.compute_dtype == "auto"


@pytest.mark.parametrize(
    ("size", "dtype"),
    [("tiny", "float32"), ("gemma3_mini", "float32"), ("gemma3_270m", "auto")],
)
def test_small_sizes_stay_in_float32(size, dtype):
    config = recipe.default_config()
    assert config.model.compute_dtype == "auto"
    recipe.set_size(config, size)
    assert config.model.compute_dtype == dtype


def test_an_unknown_dtype_is_refused(micro):
    with pytest.raises(InputError, match="unknown compute_dtype 'half'. Valid: auto, bfloat16"):
        build(micro(model__compute_dtype="half"), dry=True)


def test_a_run_keeps_its_dtype_on_another_machine(machine, micro, trained, workdir, capsys):
    """To the bit: the steps after the checkpoint have the losses that they had before."""
    assert stored_dtype(workdir) == "bfloat16"
    shutil.rmtree(workdir / "checkpoints" / "4")
    machine("slow")
    loop.train(micro(**FIELDS), workdir)
    assert stored_dtype(workdir) == "bfloat16"
    assert losses(workdir) == losses(trained)
    error = capsys.readouterr().err
    assert f"started with bfloat16, and continues with it. {SLOW}" in error
    assert error.count(SLOW) == 1 and "mean pooling, bfloat16;" in error


def test_a_float32_run_stays_so_on_a_fast_machine(machine, micro, tmp_path, capsys):
    machine("slow")
    loop.train(micro(**FIELDS), tmp_path)
    error = capsys.readouterr().err
    assert (
        "float32, as no fast bfloat16 (AVX512_BF16, AMX) was detected on this processor;" in error
    )
    assert SLOW not in error and stored_dtype(tmp_path) == "float32"
    machine("fast")
    loop.train(micro(**FIELDS), tmp_path)
    error = capsys.readouterr().err
    assert "started with float32, and continues with it; a new run on this machine" in error
    assert "mean pooling, float32;" in error


@pytest.mark.parametrize(
    ("started", "resumed", "difference"),
    [
        ("bfloat16", "auto", None),  # as before "auto" was the default
        ("auto", "bfloat16", None),
        ("auto", "float32", "model.compute_dtype: 'bfloat16' -> 'float32'"),
        ("bfloat16", "float32", "model.compute_dtype: 'bfloat16' -> 'float32'"),
    ],
)
def test_auto_agrees_with_the_dtype_of_the_run(started, resumed, difference, micro, workdir):
    text = (workdir / "config.json").read_text()
    dtype = '"compute_dtype": "{}"'.format
    assert dtype("auto") in text
    (workdir / "config.json").write_text(text.replace(dtype("auto"), dtype(started)))
    changed = build(micro(**FIELDS | {"model__compute_dtype": resumed}), dry=True).config
    if difference is None:
        assert check_run(workdir, changed)
    else:
        with pytest.raises(InputError, match=difference):
            check_run(workdir, changed)


def test_slow_bfloat16_is_reported_once(machine, micro, tmp_path, capsys):
    """In a process that trains and predicts, before the first step."""
    machine("slow")
    loop.train(micro(**FIELDS | {"model__compute_dtype": "bfloat16"}), tmp_path)
    predictor = ge.Predictor.load(tmp_path)
    predictor.predict(TEXTS)
    error = capsys.readouterr().err
    assert error.count(SLOW) == 1
    line = next(line for line in error.splitlines() if SLOW in line)
    assert line.endswith("; --config.model.compute_dtype=auto chooses float32")
    assert error.index(SLOW) < error.index("step 1/4")


def test_predictors_say_it_before_the_first_prediction(machine, workdir, capsys):
    machine("fast")
    ge.Predictor.load(workdir).predict(TEXTS)
    assert SLOW not in capsys.readouterr().err
    machine("slow")
    predictor = ge.Predictor.load(workdir)
    assert predictor.spec.encoder.compute_dtype == "bfloat16"
    assert SLOW not in capsys.readouterr().err
    for _ in range(2):
        predictor.predict(TEXTS)
    error = capsys.readouterr().err
    assert error.count(SLOW) == 1 and "load the model with compute_dtype='float32'" in error


@pytest.mark.parametrize(
    ("speed", "option", "expected"),
    [
        ("slow", None, "bfloat16"),
        ("slow", "auto", "float32"),
        ("fast", "auto", "bfloat16"),
        ("fast", "float32", "float32"),
    ],
)
def test_predictors_take_a_dtype(speed, option, expected, machine, workdir):
    machine(speed)
    predictor = ge.Predictor.load(workdir, compute_dtype=option)
    assert predictor.spec.encoder.compute_dtype == expected
    assert stored_dtype(workdir) == "bfloat16"


def test_predictors_refuse_an_unknown_dtype(workdir):
    for dtype, message in (("half", "unknown compute_dtype 'half'"), ("float16", "is refused")):
        with pytest.raises(InputError, match=message):
            ge.Predictor.load(workdir, compute_dtype=dtype)


def test_evaluation_in_a_dtype_leaves_the_run_as_it_is(machine, micro, workdir, capsys):
    machine("slow")
    config = micro(**FIELDS)
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    result = loop.evaluate(config, workdir, compute_dtype="auto")
    assert {path: path.read_bytes() for path in before} == before
    assert SLOW not in capsys.readouterr().err
    exact = loop.evaluate(config, workdir)
    assert capsys.readouterr().err.count(SLOW) == 1
    (in_float32,), (in_bfloat16,) = (of.predictions["toy_sentiment"] for of in (result, exact))
    assert 0 < abs(in_float32.scores - in_bfloat16.scores).max() < 0.1
    message = "leave out calibrate or quantization and compute_dtype"
    with pytest.raises(InputError, match=message):
        loop.evaluate(config, workdir, calibrate=True, quantization="int8", compute_dtype="auto")


def test_commands_take_a_dtype(machine, workdir, tmp_path, capsys):
    machine("slow")
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS) + "\n")
    words = ["predict", f"--workdir={workdir}", f"--input={tmp_path / 'texts.txt'}"]
    assert cli.main([*words, "--compute_dtype=auto"]) == 0
    output = capsys.readouterr()
    assert SLOW not in output.err
    assert cli.main([*words, "--compute_dtype=float32"]) == 0
    assert capsys.readouterr().out == output.out
    assert cli.main(words) == 0
    in_bfloat16 = capsys.readouterr()
    assert in_bfloat16.out != output.out and in_bfloat16.err.count(SLOW) == 1
    for command in (words, ["evaluate", "--config=quickstart", f"--workdir={workdir}"]):
        assert cli.main([*command, "--compute_dtype=half"]) == 2
        assert "auto|float32|bfloat16" in capsys.readouterr().err
