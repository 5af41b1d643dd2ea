"""GLUE and SuperGLUE from small official files."""

import pytest

from gemma_encoder.data import registry
from gemma_encoder.data.evaluation_stream import evaluation_stream
from gemma_encoder.data.stream_options import StreamOptions
from gemma_encoder.inputs.batch import BatchShape
from gemma_encoder.inputs.task import ExampleTable

OPTIONS = StreamOptions(
    BatchShape(rows=4, row_length=128, segments=6, groups=2, list_size=4), max_length=64, readers=2
)


@pytest.fixture(scope="module")
def tables(prepared, tokenizer):
    """`tables(name, split)` returns the batches and the table of a split, read once."""
    read = {}

    def get(name, split):
        if (name, split) not in read:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("TFDS_DATA_DIR", str(prepared))
                table = ExampleTable()
                source = registry.get(name)
                batches = evaluation_stream(source, 0, split, tokenizer, OPTIONS, table)
                read[name, split] = list(batches), table
        return read[name, split]

    return get
