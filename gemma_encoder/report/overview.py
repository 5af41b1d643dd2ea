"""Sections about the runs as such: commands, configs, curves and throughput."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from gemma_encoder.report import plots
from gemma_encoder.report.markup import escape, html_table
from gemma_encoder.report.runs import RunFiles
from gemma_encoder.weights.card import COUNTS

RATES = {  # columns of the table of throughput
    "texts_per_second": "texts/s",
    "real_tokens_per_second": "real tokens/s",
    "tokens_per_second": "tokens/s, padding included",
    "waiting_for_data_share": "waiting for data",
    "model_flop_utilization": "model FLOP utilization",
}


def runs_section(runs: Sequence[RunFiles]) -> str:
    """Each run's steps, workdir, command and config."""
    parts = []
    for run in runs:
        steps = max(line["step"] for line in run.lines)
        command = (
            f"<pre>{escape(run.command)}</pre>"
            if run.command
            else '<p class="muted">The command was not recorded.</p>'
        )
        config = escape(json.dumps(run.config, indent=1))
        parts.append(
            f"<h3>{escape(run.name)}</h3><p>{steps} steps. {escape(run.workdir)}</p>{command}<details><summary>config</summary><pre>{config}</pre></details>"
        )
    return "".join(parts)


def differences_section(runs: Sequence[RunFiles]) -> str:
    """The fields in which the configs differ."""
    flat = [dict(_flatten(run.config)) for run in runs]
    fields = sorted(set().union(*flat))
    rows = [
        [field, *(values.get(field, "") for values in flat)]
        for field in fields
        if len({values.get(field, "") for values in flat}) > 1
    ]
    return (
        html_table(["field", *(run.name for run in runs)], rows, plain=True)
        if rows
        else "<p>The configs are the same.</p>"
    )


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", json.dumps(value)


def curves_section(runs: Sequence[RunFiles], colors: Mapping[str, int]) -> str:
    """Training losses, learning rate and gradient norm, then every metric, over steps."""
    figures = [*_training_curves(runs, colors), *_evaluation_curves(runs, colors)]
    return plots.legend(colors) + f'<div class="plots">{"".join(figures)}</div>'


def _training_curves(runs: Sequence[RunFiles], colors: Mapping[str, int]) -> Iterable[str]:
    train = {run.name: [line for line in run.lines if line["split"] == "train"] for run in runs}
    by_task = sorted(
        {
            name
            for lines in train.values()
            for line in lines
            for name in line
            if name.endswith("/loss")
        }
    )
    names = ["loss", *(by_task if len(by_task) > 1 else ()), "learning_rate", "gradient_norm"]
    for name in names:
        series = {
            run: [(line["step"], line[name]) for line in lines if name in line]
            for run, lines in train.items()
        }
        yield plots.line_plot(
            f"train: {name if '/' in name else name.replace('_', ' ')}",
            {run: line for run, line in series.items() if line},
            "loss" if name.endswith("loss") else name.replace("_", " "),
            colors,
        )


def _evaluation_curves(runs: Sequence[RunFiles], colors: Mapping[str, int]) -> Iterable[str]:
    keys = dict.fromkeys(
        (line["task"], line["split"], name)
        for run in runs
        for line in run.lines
        if "task" in line
        for name in line
        if name not in COUNTS
    )
    for task, split, name in keys:
        series = {
            run.name: sorted(
                {
                    line["step"]: line[name]
                    for line in run.lines
                    if (line.get("task"), line["split"]) == (task, split) and name in line
                }.items()
            )
            for run in runs
        }
        yield plots.line_plot(
            f"{task}: {name}",
            {run: line for run, line in series.items() if line},
            f"{name}, {split}",
            colors,
        )


def throughput_section(runs: Sequence[RunFiles]) -> str:
    """Texts and tokens a second, and the shares of waiting and of the device's peak."""
    columns = [name for name in RATES if any(name in line for run in runs for line in run.lines)]
    rows = []
    for run in runs:
        lines = [line for line in run.lines if line["split"] == "train"]
        lines = lines[1:] or lines  # the first one holds the time of compiling
        row = [run.name]
        for name in columns:
            found = [line[name] for line in lines if name in line]
            value = float(np.median(found)) if found else None
            row.append(
                ""
                if value is None
                else f"{value:.2%}"
                if name in ("waiting_for_data_share", "model_flop_utilization")
                else f"{value:,.0f}"
            )
        rows.append(row)
    return (
        html_table(["run", *(RATES[name] for name in columns)], rows)
        + '<p class="muted">Medians over the lines of the log, the first apart.</p>'
        if columns
        else ""
    )
