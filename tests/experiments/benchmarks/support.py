"""Helpers that tests of several benchmarks share."""

import json
import pathlib

import numpy as np

from gemma_encoder.experiments.benchmarks import harness

WITH_PEER = harness.missing("torch", "transformers", "sentence-transformers", "accelerate") is None


def rows_by_arm(file: pathlib.Path) -> dict[str, dict]:
    """Returns the rows of a published table, by arm."""
    return {row.get("arm", ""): row for row in json.loads(file.read_text())["rows"]}


def lists_file(folder: pathlib.Path, queries=4, documents=3) -> pathlib.Path:
    """Writes random passages in the layout of top100.dev.tsv."""
    words = ["wing", "flow", "plate", "heat", "mach", "layer", "pressure"]
    rng = np.random.default_rng(0)
    lines = []
    for query in range(queries):
        for document in range(documents):
            passage = " ".join(rng.choice(words, rng.integers(3, 40)))
            lines.append(f"{query}\t{document}\tquery {query} about a wing\t{passage}")
    file = folder / "top100.dev.tsv"
    file.write_text("\n".join(lines) + "\n")
    return file
