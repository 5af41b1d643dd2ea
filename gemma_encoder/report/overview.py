"""Sections about whole runs: commands, configs, curves and throughput."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from gemma_encoder.inputs.json_text import to_json
from gemma_encoder.inputs.untrusted import html_text
from gemma_encoder.report import plots
from gemma_encoder.report.markup import html_table
from gemma_encoder.report.runs import RunFiles
from gemma_encoder.weights.card import COUNTS

THROUGHPUT_COLUMNS = {  # by log key
    "texts_per_second": "texts/s",
    "real_tokens_per_second": "real tokens/s",
    "tokens_per_second": "tokens/s, padding included",
    "waiting_for_data_share": "waiting for data",
    "model_flop_utilization": "model FLOP utilization",
}
_SHARES = ("waiting_for_data_share", "model_flop_utilization")  # shown as percentages


def runs_section(runs: Sequence[RunFiles]) -> str:
    """Returns the steps, workdir, command and config of each run."""
    parts = []
    for run in runs:
        steps = max(line["step"] for line in run.lines)
        if run.command:
            command = f"<pre>{html_text(run.command)}</pre>"
        else:
            command = '<p class="muted">The command was not recorded.</p>'
        config = html_text(to_json(run.config, indent=1))
        parts += [
            f"<h3>{html_text(run.name)}</h3>",
            f"<p>{steps} steps. {html_text(run.workdir)}</p>",
            command,
            f"<details><summary>config</summary><pre>{config}</pre></details>",
        ]
    return "".join(parts)


def differences_section(runs: Sequence[RunFiles]) -> str:
    """Returns a table of the config fields that differ between runs."""
    configs = [dict(_flatten(run.config)) for run in runs]
    rows = []
    for field in sorted(set().union(*configs)):
        values = [config.get(field, "") for config in configs]
        if len(set(values)) > 1:
            rows.append([field, *values])
    if not rows:
        return "<p>The configs are the same.</p>"
    return html_table(["field", *(run.name for run in runs)], rows, plain=True)


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    """Yields (dotted name, JSON value) of every leaf of a nested config."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", to_json(value)


def curves_section(runs: Sequence[RunFiles], colors: Mapping[str, int]) -> str:
    """Returns plots of losses, learning rate, gradient norm and every metric over steps."""
    figures = [*_training_curves(runs, colors), *_evaluation_curves(runs, colors)]
    return plots.legend(colors) + f'<div class="plots">{"".join(figures)}</div>'


def _training_curves(runs: Sequence[RunFiles], colors: Mapping[str, int]) -> Iterable[str]:
    train = {run.name: _training_lines(run) for run in runs}
    task_losses = {
        name
        for lines in train.values()
        for line in lines
        for name in line
        if name.endswith("/loss")
    }
    by_task = sorted(task_losses) if len(task_losses) > 1 else []
    for name in ["loss", *by_task, "learning_rate", "gradient_norm"]:
        series = {
            run: [(line["step"], line[name]) for line in lines if name in line]
            for run, lines in train.items()
        }
        title = name if "/" in name else name.replace("_", " ")
        y_label = "loss" if name.endswith("loss") else name.replace("_", " ")
        yield plots.line_plot(f"train: {title}", _nonempty(series), y_label, colors)


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
        series = {run.name: _metric_points(run, task, split, name) for run in runs}
        yield plots.line_plot(f"{task}: {name}", _nonempty(series), f"{name}, {split}", colors)


def _training_lines(run: RunFiles) -> list[dict[str, Any]]:
    return [line for line in run.lines if line["split"] == "train"]


def _metric_points(run: RunFiles, task: str, split: str, name: str) -> plots.Points:
    """Returns the (step, value) points of a metric, the last value of each step."""
    values = {
        line["step"]: line[name]
        for line in run.lines
        if (line.get("task"), line["split"]) == (task, split) and name in line
    }
    return sorted(values.items())


def _nonempty(series: Mapping[str, plots.Points]) -> dict[str, plots.Points]:
    return {run: points for run, points in series.items() if points}


def throughput_section(runs: Sequence[RunFiles]) -> str:
    """Returns a table of texts and tokens per second, data stalls and FLOP utilization."""
    columns = [
        name
        for name in THROUGHPUT_COLUMNS
        if any(name in line for run in runs for line in run.lines)
    ]
    if not columns:
        return ""
    rows = []
    for run in runs:
        lines = _training_lines(run)
        lines = lines[1:] or lines  # the first line includes compile time
        rows.append([run.name, *(_median(lines, name) for name in columns)])
    table = html_table(["run", *(THROUGHPUT_COLUMNS[name] for name in columns)], rows)
    return table + '<p class="muted">Medians over the lines of the log except the first.</p>'


def _median(lines: Sequence[Mapping[str, Any]], name: str) -> str:
    """Formats the median of a rate over log lines; returns "" if it was not logged."""
    values = [line[name] for line in lines if name in line]
    if not values:
        return ""
    median = float(np.median(values))
    return f"{median:.2%}" if name in _SHARES else f"{median:,.0f}"
