"""Databases are those of TensorStore."""

import pytest
import tensorstore

from gemma_encoder.weights.ocdbt import write_database


@pytest.mark.parametrize("count", [0, 1, 300])
def test_tensorstore_reads_all_values(tmp_path, count):
    small = {f"array {i}/.zarray": b"x" * (i * 7 % 200) for i in range(count)}
    large = {f"array {i}/0.{i}": [b"y" * (i * 300), memoryview(b"end")] for i in range(count)}
    large["ü"] = [b"", b"last"]
    write_database(tmp_path, small, large)
    base = {"driver": "file", "path": f"{tmp_path}/"}
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
    expected = small | {key: b"".join(pieces) for key, pieces in large.items()}
    assert {key.decode(): store[key] for key in store.list().result()} == expected
