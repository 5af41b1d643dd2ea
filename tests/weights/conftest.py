import jax
import pytest


@pytest.fixture(autouse=True, scope="package")
def fast_compilation():
    """Compiles without optimizations: these models take longer to compile than to run."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
