"""The paper's studies, one file each; `experiments/studies/study.py` says what a study is."""

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
    """A study by name."""
    if name not in NAMES:
        raise unknown("study", name, NAMES)
    return importlib.import_module(f"gemma_encoder.experiments.ablations.{name}").STUDY


def load_studies(names: Iterable[str] = NAMES) -> dict[str, Study]:
    """Studies by name, in the order of `NAMES`, which is that of their importance."""
    chosen = [load_study(name) for name in names]
    return {
        study.name: study for study in sorted(chosen, key=lambda study: NAMES.index(study.name))
    }
