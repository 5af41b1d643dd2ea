"""Predictions as tables for a user: flat columns, or one record per text.

`Kind.columns` gives "prediction" and what goes with it; "probabilities" holds a column per class.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gemma_encoder.inputs.task import Task

PROBABILITIES = "probabilities"


def flatten_columns(columns: Mapping[str, Any]) -> dict[str, Any]:
    """The columns with those of each class named "probability_CLASS"."""
    result: dict[str, Any] = {}
    for name, values in columns.items():
        if name == PROBABILITIES:
            result |= {f"probability_{label}": column for label, column in values.items()}
        else:
            result[name] = values
    return result


def prediction_records(task: Task, outputs: np.ndarray) -> Iterator[dict[str, Any]]:
    """One JSON-ready record per text: "prediction", and the probability of each class by name."""
    columns = task.kind.columns(task, outputs)
    for index in range(len(outputs)):
        yield {
            name: {label: float(column[index]) for label, column in values.items()}
            if name == PROBABILITIES
            else _plain(values[index])
            for name, values in columns.items()
        }


def prediction_columns(
    task: Task, fields: Sequence[Mapping[str, Any]], outputs: np.ndarray
) -> dict[str, Any]:
    """The given fields and the flat prediction columns of some texts.

    Args:
        task: what was predicted.
        fields: of each text.
        outputs: [N, …] as `Predictor.predict` gives them.
    """
    names = fields[0] if fields else ()
    columns = {name: [values[name] for values in fields] for name in names}
    return columns | flatten_columns(task.kind.columns(task, outputs))


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value
