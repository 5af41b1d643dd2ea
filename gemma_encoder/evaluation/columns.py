"""Predictions for users: flat table columns, or one record per text.

`Kind.columns` returns "prediction" and further columns; "probabilities" has a column per class.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gemma_encoder.evaluation.certainty import PLAIN, Certainty
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.task import Task

if TYPE_CHECKING:
    import pandas

PROBABILITIES = "probabilities"


def output_columns(task: Task, certainty: Certainty = PLAIN) -> dict[str, Any]:
    """Returns the columns of one text with arbitrary scores, for the names of the columns."""
    scores = np.ones((1, task.num_outputs), np.float32)
    return certainty.columns(task, task.kind.postprocess(task, scores))


def check_column_names(
    task: Task,
    names: Iterable[str],
    output: str,
    message: Callable[[str], str],
    certainty: Certainty = PLAIN,
) -> None:
    """Raises InputError if a column to repeat would be overwritten by one of the output's own.

    Args:
        task: the task to predict.
        names: columns of the input that the output repeats.
        output: "records" with a nested "probabilities", or a "table" of flat columns.
        message: returns the beginning of the error message from the name.
        certainty: options for uncertain predictions, which may add columns.
    """
    columns = output_columns(task, certainty)
    own = columns if output == "records" else flatten_columns(columns)
    for name in names:
        if name in own:
            raise InputError(
                f"{message(name)} has the name of the output's own column {name!r}, with the "
                f"predictions of task {task.name!r}; rename it"
            )


def check_finite(values: np.ndarray, what: str, name: Callable[[int], str]) -> None:
    """Raises InputError if values are NaN or infinite.

    Args:
        values: [N, …], one row per text.
        what: noun for the values, e.g. "scores".
        name: returns the name of a text from its index.
    """
    is_finite = np.isfinite(values).all(axis=tuple(range(1, values.ndim)))
    for index in np.flatnonzero(~is_finite)[:1]:
        count = len(values) - int(is_finite.sum())
        raise InputError(
            f"{name(int(index))}: the model's {what} are NaN or infinite, here and for {count} of "
            f"{len(values)} texts in all; the checkpoint is damaged or training diverged, use "
            "another one"
        )


def flatten_columns(columns: Mapping[str, Any]) -> dict[str, Any]:
    """Replaces "probabilities" by one column per class, named "probability_CLASS"."""
    result: dict[str, Any] = {}
    for name, values in columns.items():
        if name == PROBABILITIES:
            result |= {f"probability_{label}": column for label, column in values.items()}
        else:
            result[name] = values
    return result


def prediction_records(
    task: Task, outputs: np.ndarray, certainty: Certainty = PLAIN
) -> Iterator[dict[str, Any]]:
    """Yields a JSON-ready record per text: "prediction", and "probabilities" by class name."""
    columns = certainty.columns(task, outputs)
    for index in range(len(outputs)):
        record = {}
        for name, values in columns.items():
            if name == PROBABILITIES:
                record[name] = {label: float(column[index]) for label, column in values.items()}
            else:
                record[name] = _plain(values[index])
        yield record


def null_record(task: Task, certainty: Certainty = PLAIN) -> dict[str, Any]:
    """Returns the record of a text without a prediction: every value of a record is None."""
    scores = np.ones((1, task.num_outputs), np.float32)
    (record,) = prediction_records(task, task.kind.postprocess(task, scores), certainty)
    return {
        name: dict.fromkeys(value) if isinstance(value, dict) else None
        for name, value in record.items()
    }


def prediction_columns(
    task: Task,
    fields: Sequence[Mapping[str, Any]],
    outputs: np.ndarray,
    certainty: Certainty = PLAIN,
) -> dict[str, Any]:
    """Returns the fields of texts and their predictions as flat columns.

    Args:
        task: the predicted task.
        fields: fields of each text.
        outputs: [N, …], from `Predictor.predict`.
        certainty: options for uncertain predictions.
    """
    names = dict.fromkeys(name for values in fields for name in values)
    columns = {name: [values.get(name) for values in fields] for name in names}
    return columns | flatten_columns(certainty.columns(task, outputs))


def to_frame(columns: Mapping[str, Any], index: Any = None) -> "pandas.DataFrame":
    """Returns a DataFrame of columns, with the index of the input if it has one."""
    try:
        import pandas
    except ImportError:
        raise InputError(
            "as_frame needs pandas: pip install pandas, or leave it out to get numpy arrays"
        ) from None
    return pandas.DataFrame(dict(columns), index=index)


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value
