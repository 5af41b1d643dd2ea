"""Predictions for users: flat table columns, or one record per text.

`Kind.columns` returns "prediction" and further columns; "probabilities" has a column per class.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gemma_encoder.inputs.task import Task

PROBABILITIES = "probabilities"


def flatten_columns(columns: Mapping[str, Any]) -> dict[str, Any]:
    """Replaces "probabilities" by one column per class, named "probability_CLASS"."""
    result: dict[str, Any] = {}
    for name, values in columns.items():
        if name == PROBABILITIES:
            result |= {f"probability_{label}": column for label, column in values.items()}
        else:
            result[name] = values
    return result


def prediction_records(task: Task, outputs: np.ndarray) -> Iterator[dict[str, Any]]:
    """Yields a JSON-ready record per text: "prediction", and "probabilities" by class name."""
    columns = task.kind.columns(task, outputs)
    for index in range(len(outputs)):
        record = {}
        for name, values in columns.items():
            if name == PROBABILITIES:
                record[name] = {label: float(column[index]) for label, column in values.items()}
            else:
                record[name] = _plain(values[index])
        yield record


def prediction_columns(
    task: Task, fields: Sequence[Mapping[str, Any]], outputs: np.ndarray
) -> dict[str, Any]:
    """Returns the fields of texts and their predictions as flat columns.

    Args:
        task: the predicted task.
        fields: fields of each text.
        outputs: [N, …], from `Predictor.predict`.
    """
    names = fields[0] if fields else ()
    columns = {name: [values[name] for values in fields] for name in names}
    return columns | flatten_columns(task.kind.columns(task, outputs))


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value
