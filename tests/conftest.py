"""What every test stands on: eight CPU devices, repeatable hypothesis, quiet logs."""

import logging
import os
import pathlib

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import hypothesis
import jax
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

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


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """The folder of data that lies beside the repository; tests that need it are skipped where it is absent."""
    folder = pathlib.Path(__file__).resolve().parent.parent.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"the shared data folder {folder} is absent")
    return folder


@pytest.fixture(scope="session")
def tiny_config():
    """`tiny_config("gemma2" | "gemma3", **changes)`: a TransformerConfig with two whole repetitions of its pattern and one layer more."""
    import dataclasses

    from gemma_encoder.model.config import GEMMA_CONFIGS

    def make(family: str, **changes):
        published = GEMMA_CONFIGS[f"{family}_tiny"]
        small = {"num_layers": 2 * len(published.pattern) + 1, "vocab_size": 64, "embed_dim": 32, "hidden_dim": 48, "head_dim": 8, "sliding_window": 3}
        return dataclasses.replace(published, **(small | {"query_scale": 8**-0.5} | changes))

    return make
