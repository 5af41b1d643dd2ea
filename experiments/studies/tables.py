"""Reports on the runs of studies: markdown tables and PNG plots, made from result files only.

The command is `gemma-encoder tables`. Reports are committed as `experiments/RESULTS.md`.
"""

import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gemma_encoder.evaluation.bootstrap import PRIOR, RESAMPLES, Interval
from gemma_encoder.experiments import ablations
from gemma_encoder.experiments.ablations.main_tables import PUBLISHED
from gemma_encoder.experiments.studies import claims, plots, reranking
from gemma_encoder.experiments.studies.markdown import markdown_image, markdown_table
from gemma_encoder.experiments.studies.results import Results, RunKey
from gemma_encoder.experiments.studies.statistics import Cell, cells, verdict
from gemma_encoder.experiments.studies.study import MINI, SCALES, Study
from gemma_encoder.inputs import kinds
from gemma_encoder.inputs.errors import InputError

HOW = f"""\
How to read it. A value is the mean ± standard deviation over seeds, of the last step. A \
difference is to the row in bold, with a 95 %
interval of the paired Bayesian bootstrap: {RESAMPLES:,} times the same weights of the examples \
(for ranking, of the queries) and the same seeds
are drawn for both rows. A prior mass of {PRIOR} examples at the largest loss and at the largest \
gain keeps an interval from collapsing. With
three seeds the part of the seeds in an interval is coarse; with one it is missing. "Better" and \
"worse" are said where the
interval leaves out zero, and many intervals stand here: of twenty true zeros, about one leaves it \
out. Chance is the best answer that is always the
same, or a random order of the candidates. What was not run says so.
"""


def studies_report(study_results: Results, output: pathlib.Path, command: str) -> str:
    """Returns the report as markdown, and writes its plots beside `output`."""
    if not study_results.done and not study_results.failed:
        raise InputError("there is no result to report on; run gemma-encoder sweep first")
    studies = ablations.load_studies()
    unknown_studies = sorted({key.study for key in study_results.done} - set(studies))
    if unknown_studies:
        raise InputError(f"no study is called {unknown_studies[0]!r}; valid: {', '.join(studies)}")
    all_cells = cells(study_results, studies)
    parts = [f"# Results\n\nWritten by `{command}` from {_summary(study_results)}\n\n{HOW}"]
    parts.append(_claims(all_cells))
    for study in studies.values():
        if study.baseline:
            parts.append(_study(study, [cell for cell in all_cells if cell.study is study], output))
    parts.append(_reranking(all_cells, output))
    parts.append(_main_tables(studies["main_tables"], all_cells))
    parts.append(_appendix(study_results))
    return "\n".join(filter(None, parts))


def folder_of(output: pathlib.Path) -> pathlib.Path:
    """Returns the folder of a report's plots."""
    return output.with_name(f"{output.stem}_plots")


def format_interval(interval: Interval, sign: str = "+") -> str:
    """Formats a value with its bounds."""
    if not interval.exists:
        return f"{interval.value:{sign}.3f} (no interval)"
    bounds = f"[{interval.low:{sign}.3f}, {interval.high:{sign}.3f}]"
    return f"{interval.value:{sign}.3f} {bounds}"


def spread(cell: Cell, row: str, metric: str = "") -> str:
    """Formats mean ± standard deviation over seeds, or the value of a single seed."""
    values = cell.values(row, metric)
    if len(values) > 1:
        return f"{values.mean():.3f} ± {values.std(ddof=1):.3f}"
    return f"{values.mean():.3f}"


def _summary(study_results: Results) -> str:
    """Describes the runs: count, model sizes, total time, machines and versions."""
    runs = [content for content in study_results.done.values() if "same_as" not in content]
    if not runs:
        return "0 runs. None ended well."
    shared = ", some of them rows of several studies" if len(runs) < len(study_results.done) else ""
    machines = sorted({content["machine"] for content in runs})
    versions = sorted({_versions(content) for content in runs})
    parameters = sorted({content["parameters"] for content in runs})
    size = f"{parameters[0]:,}"
    if len(parameters) > 1:
        size = f"{parameters[0]:,} to {parameters[-1]:,}"
    hours = sum(content["seconds"] for content in runs) / 3600
    return (
        f"{len(runs)} runs{shared}. Models of {size} parameters; {hours:.1f} hours in all, on: "
        f"{'; '.join(machines)}. Versions: {'; or '.join(versions)}."
    )


def _versions(content: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in content["versions"].items())


def _claims(all_cells: Sequence[Cell]) -> str:
    verdicts = []
    details = []
    for claim in claims.CLAIMS:
        judged = claims.judge(claim, all_cells)
        link = f"[{claim.study}](#{_anchor(claim.study)})"
        verdicts.append((claim.text, f"**{claims.overall(claim, judged)}**", link))
        if judged:
            columns = ("task", "difference", "95 % interval", "seeds", "verdict", "")
            table = markdown_table(columns, map(_claim_row, judged))
            details.append(f"{claim.text} {claim.caution}\n\n{table}")
    head = (
        "## Claims of the paper\n\nOf arXiv 2503.02656; the last one of RankT5, its baseline. "
        "Judged from the intervals at this scale alone.\n"
    )
    return "\n".join([head, markdown_table(("claim", "verdict", "study"), verdicts), *details])


def _claim_row(item: claims.Judged) -> tuple[str, ...]:
    task = _task_name(item.cell)
    contrast = str(item.contrast)
    note = item.contrast.note
    if item.difference is None:
        return task, contrast, "not run", "", "—", note
    note = note and f"beside the claim: {note}"
    interval = format_interval(item.difference)
    return task, contrast, interval, str(item.seeds), item.verdict, note


def _anchor(study: str) -> str:
    return f"study-{study}"


def _heading(study: Study, title: str) -> str:
    return f'<a name="{_anchor(study.name)}"></a>\n\n## {title}\n\n{study.question}'


def _task_name(cell: Cell) -> str:
    return cell.task if cell.scale == MINI else f"{cell.task}, {cell.scale}"


def _study(study: Study, study_cells: Sequence[Cell], output: pathlib.Path) -> str:
    head = f"{_heading(study, f'Study: {study.name}')}\n"
    if not study_cells:
        num_rows = len(study.rows_at(MINI))
        tasks = ", ".join(study.tasks)
        return f"{head}\nNot run: none of its {num_rows} rows, on none of {tasks}.\n"
    parts = [head]
    for scale in sorted({cell.scale for cell in study_cells}):
        scale_cells = [cell for cell in study_cells if cell.scale == scale]
        with_runs = [cell for cell in scale_cells if cell.runs]
        if with_runs:
            name = study.name if scale == MINI else f"{study.name}_{scale}"
            path = folder_of(output) / f"{name}.png"
            plots.plot_study(with_runs, path)
            caption = f"{study.name}: mean and 95 % interval of each row, seeds as small dots"
            parts.append(markdown_image(caption, path))
        parts += [_cell(cell) for cell in scale_cells]
        tasks = {cell.task for cell in scale_cells}
        missing = [task for task in study.tasks if task not in tasks]
        if missing:
            parts.append(f"Not run at {scale}: {', '.join(missing)}.\n")
    return "\n".join(parts)


def _cell(cell: Cell) -> str:
    study = cell.study
    head = f"### {study.name}: {_task_name(cell)}\n"
    if not cell.runs:
        reasons = {reason for seeds in cell.failed.values() for reason in seeds.values()}
        return f"{head}\nEvery run failed: {'; '.join(sorted(reasons))}.\n"
    other_metrics = [name for name in cell.example["metrics"] if name != cell.metric]
    rows = [_row(cell, row.name, other_metrics) for row in study.rows_at(cell.scale)]
    columns = (
        *("row", "seeds", cell.metric, "difference", "verdict"),
        *other_metrics,
        "training, s",
    )
    return f"{head}\n{_clears_chance(cell)}\n\n{markdown_table(columns, rows)}"


def _row(cell: Cell, row: str, other_metrics: Sequence[str]) -> tuple[str, ...]:
    name = f"**{row}**" if row == cell.study.baseline else row
    failed = "".join(
        f"; seed {seed} failed: {reason}" for seed, reason in cell.failed.get(row, {}).items()
    )
    if row not in cell.runs:
        status = f"failed{failed}" if failed else "not run"
        return name, "0", status, *["—"] * (len(other_metrics) + 3)
    seconds = [result["training_seconds"] for result in cell.runs[row].values()]
    return (
        name,
        str(len(seconds)),
        spread(cell, row) + failed,
        *_difference(cell, row),
        *(spread(cell, row, metric) for metric in other_metrics),
        f"{sum(seconds) / len(seconds):.0f}",
    )


def _difference(cell: Cell, row: str) -> tuple[str, str]:
    """Formats a row's difference to the baseline, and its verdict."""
    baseline = cell.study.baseline
    if row == baseline:
        return "", "the baseline"
    measured = cell.contrast((row,), (baseline,))
    if measured is None:
        return "", "baseline not run"
    difference, _ = measured
    return format_interval(difference), verdict(difference, cell.lowest)


def _clears_chance(cell: Cell) -> str:
    """Compares the baseline with chance, by the baseline's interval."""
    baseline = cell.study.baseline
    if baseline not in cell.runs:
        return "The baseline was not run."
    chance = cell.chance()
    interval = cell.estimate(baseline)
    value = f"The baseline's {cell.metric} is {format_interval(interval, '')}"
    if chance is None:
        return f"{value}; what chance gives is not known."
    outcome = "does not clear chance: differences between rows mean little"
    if interval.high < chance if cell.lowest else interval.low > chance:
        outcome = "clears chance"
    return f"{value}, chance {chance:.3f}: it {outcome}."


RERANKING_HEAD = (
    "## Ranking\n\nThe re-ranker beside the first stage (BM25) whose candidates it orders, by the "
    "results' own record of it. Queries won, tied and "
    "lost are counted in every seed. Interpolated: (1 − w) · score + w · (−log rank), both "
    "standardized over a query's candidates (the first stage "
    "gives ranks only, no scores); w is one of 0, 0.1 … 1, chosen for each of "
    f"{reranking.FOLDS} folds of queries on the other folds, so that no query "
    "chooses its own. Differences are to the first stage.\n"
)


def _reranking(all_cells: Sequence[Cell], output: pathlib.Path) -> str:
    parts: list[str] = []
    reported: set[frozenset[str]] = set()  # digests of rows; rows of several studies are equal
    for cell in all_cells:
        if not _has_first_stage(cell):
            continue
        rows = []
        for row in [row.name for row in cell.study.rows_at(cell.scale) if row.name in cell.runs]:
            digests = frozenset(result["digest"] for result in cell.runs[row].values())
            if digests in reported:
                continue
            reported.add(digests)
            comparison = reranking.compare_to_first_stage(cell, row)
            if row == cell.study.baseline:
                scale = "" if cell.scale == MINI else f"_{cell.scale}"
                path = folder_of(output) / f"reranking_{cell.study.name}{scale}.png"
                plots.plot_reranking(comparison, path)
                caption = f"{row} against the first stage, by query, and the interpolation"
                parts += [markdown_image(caption, path), _extremes(comparison)]
            rows.append(_reranking_row(cell, comparison))
        if rows:
            parts.append(
                f"{_task_name(cell)}, MRR@10:\n\n{markdown_table(RERANKING_COLUMNS, rows)}"
            )
    return "\n".join([RERANKING_HEAD, *parts]) if parts else ""


def _has_first_stage(cell: Cell) -> bool:
    if not cell.runs or not kinds.get(cell.example["kind"]).ranks:
        return False
    return "first_stage" in cell.example["outcomes"][cell.metric]


RERANKING_COLUMNS = (
    "row",
    "first stage",
    "re-ranker",
    "difference",
    "queries won / tied / lost",
    "interpolated",
    "difference",
    "verdict",
    "folds' weights",
)


def _reranking_row(cell: Cell, comparison: reranking.Comparison) -> tuple[str, ...]:
    return (
        f"{cell.study.name} {comparison.row}",
        f"{comparison.first_stage:.4f}",
        f"{comparison.reranked:.4f}",
        format_interval(comparison.gain),
        f"{comparison.wins} / {comparison.ties} / {comparison.losses}",
        f"{comparison.interpolated:.4f}",
        format_interval(comparison.interpolated_gain),
        verdict(comparison.interpolated_gain),
        ", ".join(f"{weight:g}" for weight in comparison.weights),
    )


def _extremes(comparison: reranking.Comparison, count: int = 5) -> str:
    ordered = sorted(comparison.differences.items(), key=lambda item: -item[1])
    won = _signed_values(ordered[:count])
    lost = _signed_values(ordered[::-1][:count])
    return (
        f"Queries of `{comparison.row}`, by the mean over seeds: most won {won}; "
        f"most lost {lost}.\n"
    )


def _signed_values(queries: Iterable[tuple[str, float]]) -> str:
    return ", ".join(f"{query} ({value:+.2f})" for query, value in queries)


def _main_tables(study: Study, all_cells: Sequence[Cell]) -> str:
    by_key = {(cell.task, cell.scale): cell for cell in all_cells if cell.study is study}
    present = {scale for _, scale in by_key}
    scales = [scale for scale in SCALES if scale in present] or [MINI]
    missing = [scale for scale in SCALES if scale not in scales]

    def value(task: str, scale: str) -> str:
        cell = by_key.get((task, scale))
        if cell is None or (not cell.runs and not cell.failed):
            return "not run"
        if not cell.runs:
            return "failed"
        return f"{cell.metric} {spread(cell, scale)} ({len(cell.runs[scale])} seeds)"

    rows = [(task, *(value(task, scale) for scale in scales)) for task in study.tasks]
    return "\n".join(
        [
            f"{_heading(study, 'Main tables')} Validation splits.\n",
            markdown_table(("task", *scales), rows),
            f"Not run at all: {', '.join(missing)}.\n",
            "What others publish for the whole benchmarks, to compare real sizes with; none of it "
            "was measured here:\n",
            markdown_table(
                ("benchmark", "split", "model", "published, not measured", "source"), PUBLISHED
            ),
        ]
    )


APPENDIX_COLUMNS = (
    "row",
    "task",
    "seed",
    "metric",
    "config changes",
    "training, s",
    "all, s",
    "date",
    "command that repeats it",
)


def _appendix(study_results: Results) -> str:
    done = sorted(study_results.done.items(), key=lambda item: _appendix_order(item[0]))
    rows = [_appendix_row(key, content) for key, content in done]
    head = (
        "## Every run\n\nChanges are to the recipe of the task and scale. Seconds of training, and "
        "of everything: compiling, evaluation, checkpoint.\n"
    )
    text = f"{head}\n{markdown_table(APPENDIX_COLUMNS, rows)}"
    failed = [
        (f"{key.study} {key.row}", key.task, str(key.seed), reason)
        for key, reason in study_results.failed.items()
    ]
    if failed:
        text += f"\nFailed:\n\n{markdown_table(('row', 'task', 'seed', 'reason'), failed)}"
    return text


def _appendix_order(key: RunKey) -> tuple:
    return ablations.NAMES.index(key.study), key.scale, key.task, key.row, key.seed


def _appendix_row(key: RunKey, content: Mapping[str, Any]) -> tuple[str, ...]:
    changes = ", ".join(f"{field}={value}" for field, value in content["changes"].items())
    if "same_as" in content:
        changes = f"the run {content['same_as'].removesuffix('.json')}"
    return (
        f"{key.study} {key.row}",
        key.task,
        str(key.seed),
        f"{content['metrics'][content['main_metric']]:.4f}",
        changes or "none",
        f"{content['training_seconds']:.0f}",
        f"{content['seconds']:.0f}",
        content["date"],
        f"`{content['command']}`",
    )
