"""The paper's studies, one file each; `experiments/studies/study.py` defines a study."""

import importlib
from collections.abc import Iterable

from gemma_encoder.experiments.studies.study import Study
from gemma_encoder.inputs.errors import unknown

NAMES = (
    "attention",
    "pooling",
    "dropout",
    "padding",
    "ranking_loss",
    "hyperparameters",
    "data_size",
    "main_tables",
)


def load_study(name: str) -> Study:
    """Returns a study by name."""
    if name not in NAMES:
        raise unknown("study", name, NAMES)
    return importlib.import_module(f"gemma_encoder.experiments.ablations.{name}").STUDY


def load_studies(names: Iterable[str] = NAMES) -> dict[str, Study]:
    """Returns studies by name, in the order of `NAMES`, the order of importance."""
    studies = [load_study(name) for name in names]
    studies.sort(key=lambda study: NAMES.index(study.name))
    return {study.name: study for study in studies}
