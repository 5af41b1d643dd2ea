"""Setup of all tests: eight CPU devices, fast cached compilation, deterministic hypothesis."""

import atexit
import contextlib
import importlib.metadata
import logging
import os
import pathlib
import shutil
import subprocess
import tempfile

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# Lets two workers compile for a TPU at once: libtpu otherwise locks a file of the machine.
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
# Models this small take longer to compile than to run. Subprocesses of tests inherit this
# setting, and the cache folder below.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# The older code generator is twice as fast; XLA of jaxlib 0.12 has removed it, and aborts at
# unknown flags.
if "XLA_FLAGS" not in os.environ:
    os.environ["XLA_FLAGS"] = "--xla_cpu_parallel_codegen_split_count=1"
    if importlib.metadata.version("jaxlib").startswith("0.10."):
        os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
# The first process of a test run creates the folder; workers inherit it from the environment.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="compiled_for_tests_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import hypothesis
import jax
import pytest

from gemma_encoder import runtime

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
runtime.collect_garbage_rarely()  # otherwise a tenth of the time of all tests


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable():
    """Lets worker processes report on tests with names of files that are no Unicode."""
    return _as_unicode((yield))


def _as_unicode(value):
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()
    if isinstance(value, dict):
        return {_as_unicode(key): _as_unicode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_as_unicode, value))
    return value


@pytest.fixture
def killed_after(monkeypatch):
    """`killed_after(count, error)`: a context in which file replacements after `count` raise."""
    replace = os.replace

    @contextlib.contextmanager
    def context(count, error):
        replaced = []

        def counted(source, target):
            if len(replaced) == count:
                raise error
            replaced.append(target)
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", counted)
            yield

    return context


hypothesis.settings.register_profile(
    "repeatable",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=50,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("repeatable")

for name in ("absl", "jax", "tensorflow"):
    logging.getLogger(name).setLevel(logging.WARNING)


@pytest.fixture(autouse=True)
def log_level():
    """Restores the log level, which programs that run in this process lower."""
    import absl.logging

    before = absl.logging.get_verbosity()
    yield
    absl.logging.set_verbosity(before)


HURRY = "jax_disable_most_optimizations"
HURRIES = jax.config.read(HURRY)


@pytest.fixture(autouse=True)
def compiles_in_a_hurry():
    """Fails if an earlier test or fixture left XLA's optimizations on, which are slow."""
    assert jax.config.read(HURRY) == HURRIES


@pytest.fixture
def background(monkeypatch, request):
    """Sets whether runs write checkpoints in the background: the test's parameter, or True."""
    import functools

    from gemma_encoder.training import checkpoint, loop

    value = getattr(request, "param", True)
    monkeypatch.setattr(
        loop, "Checkpoints", functools.partial(checkpoint.Checkpoints, background=value)
    )
    return value


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """Folder of real data beside the repository; tests that need it are skipped without it."""
    folder = pathlib.Path(__file__).resolve().parent.parent.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"the shared data folder {folder} is absent")
    return folder


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """Folder for TFDS_DATA_DIR with small GLUE and SuperGLUE data; see tests/official.py."""
    from tests import official

    return official.prepare(tmp_path_factory.mktemp("official"))


@pytest.fixture
def benchmarks(prepared, monkeypatch):
    """The folder of `prepared`, with TFDS_DATA_DIR set to it."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))
    return prepared


@pytest.fixture(scope="session")
def tiny_config():
    """`tiny_config("gemma2" | "gemma3", **changes)`: a small TransformerConfig.

    It has two repetitions of the layer pattern, and one more layer.
    """
    import dataclasses

    from gemma_encoder.model.sizes import GEMMA_CONFIGS

    def make(family: str, **changes):
        published = GEMMA_CONFIGS[f"{family}_tiny"]
        small = {
            "num_layers": 2 * len(published.pattern) + 1,
            "vocab_size": 64,
            "embed_dim": 32,
            "hidden_dim": 48,
            "head_dim": 8,
            "sliding_window": 3,
        }
        return dataclasses.replace(published, **(small | {"query_scale": 8**-0.5} | changes))

    return make


@pytest.fixture(scope="session")
def changed():
    """`changed(config, {"batch__rows": 8})` sets fields of a config, without type checks."""
    from tests.micro import changed

    return changed


@pytest.fixture(scope="session")
def micro():
    """`micro(**changes)`: the quickstart's config with a model so small that a run takes seconds.

    Changes are given as `batch__rows=8`. The model has one local and one global layer.
    """
    from tests.micro import micro_config

    return micro_config


@pytest.fixture(scope="session")
def random_predictor(tiny_config):
    """`random_predictor(pooling="mean", **changes)`: an untrained Predictor with toy tasks.

    Changes are fields of the EncoderConfig.
    """
    import gemma_encoder as ge
    from gemma_encoder.data.source import DataOptions
    from gemma_encoder.data.tasks.toy import TASKS
    from gemma_encoder.model.encoder import initial_parameters
    from gemma_encoder.weights.native import InferenceSpec

    tasks = tuple(declare(DataOptions()).task for declare in TASKS.values())
    tokenizer = ge.Tokenizer.load("small")

    def make(pooling: str = "mean", **changes):
        transformer = tiny_config("gemma3", vocab_size=tokenizer.vocab_size, sliding_window=4)
        config = ge.EncoderConfig(
            transformer,
            {task.head: task.num_outputs for task in tasks},
            pooling=ge.PoolingConfig(pooling, probes=3, heads=4),
            compute_dtype="float32",
            **changes,
        )
        return ge.Predictor(
            InferenceSpec(config, tasks, tokenizer, 64, 64, "right", 0),
            initial_parameters(config, jax.random.key(0)),
        )

    return make


class SmallDisk:
    """A file system of a few megabytes.

    Attributes:
        folder: where it is mounted.
    """

    def __init__(self, folder):
        self.folder = folder
        self._filler = folder / "filler"

    def fill(self, free=0):
        """Leaves no more than `free` bytes."""
        with contextlib.suppress(OSError), self._filler.open("wb", buffering=0) as file:
            while file.write(b"\0" * 4096) == 4096:
                pass
        os.truncate(self._filler, self._filler.stat().st_size - free)

    def clear(self):
        """Frees the space that `fill` took."""
        self._filler.unlink()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 16 MB; the test is skipped where none can be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("file systems cannot be mounted here")
    yield SmallDisk(folder)
    subprocess.run(["umount", "--lazy", str(folder)], check=True)
