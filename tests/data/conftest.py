"""Fixtures of the data tests."""

import pytest

from gemma_encoder.inputs.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer.load("small")


@pytest.fixture(scope="module")
def seqio():
    """The module seqio, with the tasks of this library registered."""
    import seqio

    import gemma_encoder.data.seqio_tasks  # noqa: F401, registers

    return seqio
