"""One self-contained HTML page about one run or several: what differs, curves, metrics with intervals, mistakes, wins and losses.

python -m gemma_encoder.report runs/one runs/two --output=report.html

It reads what runs leave in their workdirs, and nothing else; several runs are compared with the first.
"""

import argparse
import dataclasses
import html
import json
import pathlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from gemma_encoder import report_plots
from gemma_encoder.evaluation import bootstrap, metrics, ranking
from gemma_encoder.evaluation.evaluator import mistake_file, prediction_file
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.task import ExampleTable, Task
from gemma_encoder.training.metrics_log import read_metrics
from gemma_encoder.weights.card import COUNTS

MISTAKES = 20  # that are shown of a task
EXTREMES = 5  # queries won and lost by most
RATES = {  # columns of the table of throughput
    "texts_per_second": "texts/s",
    "real_tokens_per_second": "real tokens/s",
    "tokens_per_second": "tokens/s, padding included",
    "waiting_for_data_share": "waiting for data",
    "model_flop_utilisation": "model FLOP utilisation",
}
STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; padding: 12px 16px 60px; max-width: 1500px; }
h1 { font-size: 1.5em } h2 { font-size: 1.2em; margin-top: 2em; border-bottom: 1px solid var(--line) } h3 { font-size: 1em; margin-bottom: .3em }
.scroll { overflow-x: auto; max-width: 100% } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: 3px 12px 3px 0; vertical-align: top; border-bottom: 1px solid var(--line) }
td.number { text-align: right; white-space: nowrap }
td.text { min-width: 220px; max-width: 60ch; overflow-wrap: anywhere } td.cell { text-align: center; padding: 8px 12px; border: 1px solid var(--line) }
code, pre { font-size: .9em; overflow-wrap: anywhere; white-space: pre-wrap } .muted { opacity: .7 }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 400px), 1fr)); gap: 12px }
.plot { width: 100%; height: auto } .plot text { fill: currentColor } .title { font: 600 14px system-ui } .tick { font: 12px system-ui }
.end { text-anchor: end } .middle { text-anchor: middle } .grid { stroke: currentColor; stroke-opacity: .18 } .key { margin-right: 18px; white-space: nowrap }
"""


@dataclasses.dataclass
class Run:
    """What a workdir holds.

    Attributes:
        name: unique among the runs of the report.
        workdir: where it lies.
        config: nested.
        lines: of `metrics.jsonl`.
        tasks: those that it was trained on, by name; none where it has no checkpoint yet.
        command: how it was started, if that was recorded.
    """

    name: str
    workdir: pathlib.Path
    config: dict[str, Any]
    lines: list[dict[str, Any]]
    tasks: dict[str, Task]
    command: str

    @classmethod
    def load(cls, workdir: pathlib.Path, name: str) -> "Run":
        """Reads a workdir; raises InputError where it is none."""
        if not (workdir / "config.json").is_file():
            what = "holds no config.json" if workdir.is_dir() else "does not exist"
            raise InputError(f"{workdir} {what}; give the workdir of a run")
        config = _read_json(workdir / "config.json")
        found = sorted(
            workdir.glob("checkpoints/*/inference/inference.json"),
            key=lambda path: int(path.parts[-3]) if path.parts[-3].isdigit() else -1,
        )
        description = _read_json(found[-1]) if found else {}
        tasks = {task.name: task for task in map(Task.from_dict, description.get("tasks", ()))}
        lines = read_metrics(workdir)
        if not lines:
            raise InputError(f"{workdir} has no line in metrics.jsonl yet; train first")
        return cls(
            name, workdir, config, lines, tasks, description.get("record", {}).get("command", "")
        )

    def latest(self) -> dict[tuple[str, str], dict[str, Any]]:
        """The newest line of each task and split."""
        return {(line["task"], line["split"]): line for line in self.lines if "task" in line}

    def parts(self, task: str, split: str) -> dict[str, str]:
        """The splits that were predicted of what a line calls `split`, by what tells their metrics apart; as in `Source.evaluation_splits`."""
        folder, found = self.workdir / "predictions", {}
        for path in sorted(
            [*folder.glob(f"{task}.{split}*.jsonl"), *folder.glob(f"{task}.{split}*.trec")]
        ):
            name = path.name.removeprefix(f"{task}.").rsplit(".", 1)[0]
            if name == split or (name.startswith(f"{split}_") and "." not in name):
                found[name.removeprefix(split).removeprefix("_")] = name
        return found


@dataclasses.dataclass
class Scored:
    """What a run said of a split, ready to be resampled: metrics are functions of which units (examples, questions, queries) count."""

    task: str
    split: str
    units: list[str]
    metrics: dict[str, Any]  # from [n] numbers of units to a value


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the page and returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m gemma_encoder.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "workdirs",
        nargs="+",
        type=pathlib.Path,
        metavar="WORKDIR",
        help="of a run; the others are compared with the first one",
    )
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        default=pathlib.Path("report.html"),
        help="the page (default: %(default)s)",
    )
    arguments = parser.parse_args(argv)
    try:
        page = report(arguments.workdirs)
        try:
            arguments.output.write_text(page, encoding="utf-8")
        except OSError as error:
            raise InputError(
                f"--output={arguments.output} cannot be written: {error.strerror}"
            ) from None
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {arguments.output}, {len(page) / 1024:.0f} KiB: open it in a browser")
    return 0


def report(workdirs: Sequence[pathlib.Path]) -> str:
    """The page about some runs; raises InputError where one of them is no run."""
    names = _names(workdirs)
    runs = [
        Run.load(pathlib.Path(workdir), name) for workdir, name in zip(workdirs, names, strict=True)
    ]
    colours = {run.name: number for number, run in enumerate(runs)}
    scored = {run.name: _scored(run) for run in runs}
    sections = [
        ("Runs", _runs(runs)),
        ("What differs", _differences(runs) if len(runs) > 1 else ""),
        ("Curves", _curves(runs, colours)),
        ("Metrics", _metrics(runs, scored)),
        ("Confusion", "".join(_confusion(run, len(runs) > 1) for run in runs)),
        ("Worst mistakes", "".join(_mistakes(run, len(runs) > 1) for run in runs)),
        ("Against the first stage", "".join(_first_stage(run, len(runs) > 1) for run in runs)),
        ("Throughput", _throughput(runs)),
    ]
    title = f"Report on {', '.join(names)}"
    body = "".join(
        f"<section><h2>{name}</h2>{content}</section>" for name, content in sections if content
    )
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>{_text(title)}</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body><h1>{_text(title)}</h1>{body}</body></html>\n'


def _names(workdirs: Sequence[pathlib.Path]) -> list[str]:
    """The folders' own names, with as much of the path before them as tells them apart."""
    paths = [pathlib.Path(workdir).resolve() for workdir in workdirs]
    if len(set(paths)) < len(paths):
        raise InputError("a workdir is named twice")
    for count in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-count:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(
            f"{path} cannot be read ({error}); it is damaged or was copied in part"
        ) from None


def _lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file; none where it is not there."""
    lines = []
    for number, text in enumerate(path.read_text().splitlines() if path.exists() else (), 1):
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            raise InputError(
                f"{path}:{number}: not a JSON object; evaluate again with --mode=eval"
            ) from None
    return lines


def _scored(run: Run) -> list[Scored]:
    """Everything that the run predicted and that can be measured again from its files."""
    found = []
    for (name, split), line in run.latest().items():
        for part, whole in run.parts(name, split).items():
            wanted = [
                metric
                for metric in line
                if metric not in COUNTS and (not part or metric.endswith(f"_{part}"))
            ]
            plain = {
                metric: metric.removesuffix(f"_{part}") if part else metric for metric in wanted
            }
            if (run.workdir / "predictions" / f"{name}.{whole}.trec").exists():
                found += _scored_run(run, name, whole, plain)
            elif name in run.tasks and run.tasks[name].kind != "ranking":
                found.append(_scored_examples(run, run.tasks[name], whole, plain))
    return found


def _scored_run(run: Run, task: str, split: str, names: Mapping[str, str]) -> list[Scored]:
    folder = run.workdir / "predictions"
    if not (folder / f"{task}.{split}.qrels").exists():
        return []
    qrels, documents = (
        _trec_qrels(folder / f"{task}.{split}.qrels"),
        _trec_run(folder / f"{task}.{split}.trec"),
    )
    queries = list(qrels)
    functions = {}
    for shown, metric in names.items():
        values = ranking.by_query(metric, qrels, documents)
        array = np.array([values[query] for query in queries])
        functions[shown] = lambda chosen, array=array: float(array[chosen].mean())
    return [Scored(task, split, queries, functions)]


def _scored_examples(run: Run, task: Task, split: str, names: Mapping[str, str]) -> Scored:
    lines = _lines(pathlib.Path(prediction_file(run.workdir / "predictions", task.name, split)))
    table = ExampleTable(
        [line.get("label", 0.0) for line in lines],
        [line.get("query", "") for line in lines],
        [line.get("document", "") for line in lines],
        lines,
    )
    labels, said = (
        np.array(table.labels),
        np.array(
            [
                [line["nll"], line["tokens"]]
                if task.kind == "language_model"
                else line["prediction"]
                for line in lines
            ]
        ),
    )
    grouped = any(table.query_ids)
    units = table.groups() if grouped else {str(number): [number] for number in range(len(lines))}
    groups = [np.array(members) for members in units.values()]

    def measure(chosen: np.ndarray, metric: str) -> float:
        members, draws = bootstrap.draw_groups(groups, chosen) if grouped else (chosen, chosen)
        infos = [lines[i] for i in members] if task.kind == "choice" else []
        drawn = ExampleTable(
            query_ids=[str(draw) for draw in draws] if grouped else [], infos=infos
        )
        return metrics.METRICS[task.kind][metric](labels[members], said[members], drawn)

    functions = {
        shown: lambda chosen, metric=metric: measure(chosen, metric)
        for shown, metric in names.items()
    }
    return Scored(task.name, split, list(units), functions)


def _trec_run(path: pathlib.Path) -> ranking.Run:
    run: ranking.Run = {}
    for line in path.read_text().splitlines():
        query, _, document, _, score, _ = line.split(" ")
        run.setdefault(query, []).append((document, float(score)))
    return run


def _trec_qrels(path: pathlib.Path) -> dict[str, dict[str, float]]:
    qrels: dict[str, dict[str, float]] = {}
    for line in path.read_text().splitlines():
        query, _, document, grade = line.split(" ")
        qrels.setdefault(query, {})[document] = float(grade)
    return qrels


# Sections.


def _runs(runs: Sequence[Run]) -> str:
    parts = []
    for run in runs:
        steps = max(line["step"] for line in run.lines)
        command = (
            f"<pre>{_text(run.command)}</pre>"
            if run.command
            else '<p class="muted">The command was not recorded.</p>'
        )
        config = _text(json.dumps(run.config, indent=1))
        parts.append(
            f"<h3>{_text(run.name)}</h3><p>{steps} steps. {_text(run.workdir)}</p>{command}<details><summary>config</summary><pre>{config}</pre></details>"
        )
    return "".join(parts)


def _differences(runs: Sequence[Run]) -> str:
    flat = [dict(_flatten(run.config)) for run in runs]
    fields = sorted(set().union(*flat))
    rows = [
        [field, *(values.get(field, "") for values in flat)]
        for field in fields
        if len({values.get(field, "") for values in flat}) > 1
    ]
    return (
        _table(["field", *(run.name for run in runs)], rows, plain=True)
        if rows
        else "<p>The configs are the same.</p>"
    )


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", json.dumps(value)


def _curves(runs: Sequence[Run], colours: Mapping[str, int]) -> str:
    plots = []
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
        label = "loss" if name.endswith("loss") else name.replace("_", " ")
        plots.append(
            report_plots.line_plot(
                f"train: {name if '/' in name else name.replace('_', ' ')}",
                {run: line for run, line in series.items() if line},
                label,
                colours,
            )
        )
    kinds = dict.fromkeys(
        (line["task"], line["split"], name)
        for run in runs
        for line in run.lines
        if "task" in line
        for name in line
        if name not in COUNTS
    )
    for task, split, name in kinds:
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
        plots.append(
            report_plots.line_plot(
                f"{task}: {name}",
                {run: line for run, line in series.items() if line},
                f"{name}, {split}",
                colours,
            )
        )
    return report_plots.legend(colours) + f'<div class="plots">{"".join(plots)}</div>'


def _metrics(runs: Sequence[Run], scored: Mapping[str, Sequence[Scored]]) -> str:
    by_key = {
        run.name: {(item.task, item.split): item for item in scored[run.name]} for run in runs
    }
    cache: dict[tuple[str, str, str, str], np.ndarray] = {}

    def values(run: str, item: Scored, metric: str) -> np.ndarray:
        key = (run, item.task, item.split, metric)
        if key not in cache:
            cache[key] = bootstrap.resampled(item.metrics[metric], len(item.units))
        return cache[key]

    rows = []
    keys = dict.fromkeys(
        (task, split, metric)
        for run in runs
        for (task, split), line in run.latest().items()
        for metric in line
        if metric not in COUNTS
    )
    for task, split, metric in keys:
        base = None
        for number, run in enumerate(runs):
            line = run.latest().get((task, split), {})
            if metric not in line:
                continue
            item = next(
                (
                    item
                    for (name, whole), item in by_key[run.name].items()
                    if name == task and metric in item.metrics and whole.startswith(split)
                ),
                None,
            )
            interval = difference = "—"
            if item is not None:
                whole = np.arange(len(item.units))
                value = item.metrics[metric](whole)
                found = bootstrap.interval(value, values(run.name, item, metric))
                interval = f"{found.low:.3f} to {found.high:.3f}"
                if number == 0:
                    base = item
                elif base is not None and base.units == item.units:
                    change = bootstrap.interval(
                        value - base.metrics[metric](whole),
                        values(run.name, item, metric) - values(runs[0].name, base, metric),
                    )
                    difference = f"{change.value:+.3f} ({change.low:+.3f} to {change.high:+.3f})"
            units = len(item.units) if item else line.get("examples", "")
            rows.append(
                [
                    task,
                    split,
                    metric,
                    run.name,
                    f"{line[metric]:.3f}",
                    interval,
                    *([difference] if len(runs) > 1 else []),
                    units,
                ]
            )
    if not rows:
        return '<p class="muted">Nothing was evaluated yet.</p>'
    head = [
        "task",
        "split",
        "metric",
        "run",
        "value",
        "95 % interval",
        *([f"difference to {runs[0].name}"] if len(runs) > 1 else []),
        "units",
    ]
    note = (
        "Intervals: percentile bootstrap, 1,000 resamples of units, which are examples, or questions, pairs or queries where metrics are over these. "
        "They say how much the test set's choice matters, not how much the seed does. Differences are paired: both runs on the same resamples."
    )
    missing = (
        ""
        if any(row[5] != "—" for row in rows)
        else " Predictions that go with the values were not found: evaluate with --mode=eval."
    )
    return _table(head, rows) + f'<p class="muted">{note}{missing}</p>'


def _confusion(run: Run, several: bool) -> str:
    parts = []
    for (name, split), _ in run.latest().items():
        task = run.tasks.get(name)
        if task is None or task.kind != "classification":
            continue
        for whole in run.parts(name, split).values():
            lines = [
                line
                for line in _lines(
                    pathlib.Path(prediction_file(run.workdir / "predictions", name, whole))
                )
                if not task.is_unlabelled(line["label"])
            ]
            if not lines:
                continue
            matrix = np.zeros((len(task.classes), len(task.classes)), int)
            np.add.at(
                matrix,
                ([line["label"] for line in lines], [line["prediction"] for line in lines]),
                1,
            )
            shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
            head = "".join(
                f"<th>{_text(label)}</th>" for label in ("label \\ predicted", *task.classes)
            )
            rows = "".join(
                f"<tr><th>{_text(label)}</th>"
                + "".join(
                    f'<td class="cell" style="background:color-mix(in srgb, {report_plots.COLOURS[0]} {60 * shares[i, j]:.0f}%, transparent)">'
                    f"{matrix[i, j]}<br>{shares[i, j]:.1%}</td>"
                    for j in range(len(task.classes))
                )
                + "</tr>"
                for i, label in enumerate(task.classes)
            )
            parts.append(
                f'<h3>{_text(_titled(run, several, name, whole))}</h3><div class="scroll"><table><tr>{head}</tr>{rows}</table></div>'
            )
    return "".join(parts)


def _mistakes(run: Run, several: bool) -> str:
    parts = []
    for (name, split), _ in run.latest().items():
        task = run.tasks.get(name)
        if task is None or task.kind not in ("classification", "regression"):
            continue
        for whole in run.parts(name, split).values():
            path = pathlib.Path(mistake_file(run.workdir / "predictions", name, whole))
            title = f"<h3>{_text(_titled(run, several, name, whole))}</h3>"
            if not path.exists():
                parts.append(
                    f'{title}<p class="muted">Not kept by this run; --mode=eval writes them.</p>'
                )
                continue
            rows = []
            for line in _lines(path)[:MISTAKES]:
                text = " | ".join(line["fields"].values())
                if task.kind == "classification":
                    rows.append(
                        [
                            text,
                            task.classes[line["label"]],
                            task.classes[line["prediction"]],
                            f"{max(line['probabilities']):.3f}",
                        ]
                    )
                else:
                    rows.append(
                        [
                            text,
                            f"{line['label']:g}",
                            f"{line['prediction']:.3f}",
                            f"{line['prediction'] - line['label']:+.3f}",
                        ]
                    )
            last = "probability" if task.kind == "classification" else "error"
            parts.append(
                title
                + (_table(["text", "label", "prediction", last], rows) if rows else "<p>None.</p>")
            )
    return "".join(parts)


def _first_stage(run: Run, several: bool) -> str:
    parts = []
    folder = run.workdir / "predictions"
    for (name, split), line in run.latest().items():
        for whole in run.parts(name, split).values():
            before = folder / f"{name}.{whole}.first_stage.trec"
            if not before.exists() or not (folder / f"{name}.{whole}.qrels").exists():
                continue
            metric = next(metric for metric in line if metric not in COUNTS)
            qrels = _trec_qrels(folder / f"{name}.{whole}.qrels")
            old, new = (
                ranking.by_query(metric, qrels, _trec_run(path))
                for path in (before, folder / f"{name}.{whole}.trec")
            )
            texts = {
                row["query"]: row["text"]
                for row in _lines(folder / f"{name}.{whole}.queries.jsonl")
            }
            change = {query: new[query] - old[query] for query in qrels}
            won, lost = (sum(sign * value > 0 for value in change.values()) for sign in (1, -1))
            ordered = sorted(change, key=lambda query: (-change[query], query))
            extremes = [query for query in ordered[:EXTREMES] if change[query] > 0] + [
                query for query in ordered[-EXTREMES:] if change[query] < 0
            ]
            rows = [
                [
                    query,
                    texts.get(query, ""),
                    f"{old[query]:.3f}",
                    f"{new[query]:.3f}",
                    f"{change[query]:+.3f}",
                ]
                for query in extremes
            ]
            means = f"{metric}: first stage {np.mean(list(old.values())):.3f}, this run {np.mean(list(new.values())):.3f}"
            parts.append(
                f"<h3>{_text(_titled(run, several, name, whole))}</h3><p>{_text(means)}. "
                f"{won} queries won, {len(change) - won - lost} tied, {lost} lost.</p>"
                + f'<div class="plots">{report_plots.difference_plot(f"{metric}, change by query", list(change.values()), "queries, best first")}</div>'
                + _table(["query", "text", "first stage", "this run", "change"], rows)
            )
    return "".join(parts)


def _throughput(runs: Sequence[Run]) -> str:
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
                if name in ("waiting_for_data_share", "model_flop_utilisation")
                else f"{value:,.0f}"
            )
        rows.append(row)
    return (
        _table(["run", *(RATES[name] for name in columns)], rows)
        + '<p class="muted">Medians over the lines of the log, the first apart.</p>'
        if columns
        else ""
    )


def _titled(run: Run, several: bool, task: str, split: str) -> str:
    return f"{run.name}: {task}, {split}" if several else f"{task}, {split}"


def _text(value: Any) -> str:
    return html.escape(str(value))


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]], plain: bool = False) -> str:
    """A table that scrolls in its own frame; numbers stand right unless it is plain."""

    def cell(value: Any, name: str) -> str:
        text = str(value)
        number = text[:1] in tuple("+-0123456789") and name != "query" and not plain
        kind = "text" if name == "text" else "number" if number else ""
        return (
            f'<td class="{kind}">{html.escape(text)}</td>'
            if kind
            else f"<td>{html.escape(text)}</td>"
        )

    names = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    lines = "".join(
        f"<tr>{''.join(cell(value, name) for value, name in zip(row, head, strict=True))}</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><tr>{names}</tr>{lines}</table></div>'


if __name__ == "__main__":
    sys.exit(main())
