"""A report on the runs of studies: markdown tables and PNG plots from result files alone.

`gemma-encoder tables` is the program.
"""

import pathlib
from collections.abc import Iterable, Mapping, Sequence

from gemma_encoder.evaluation.bootstrap import RESAMPLES, Interval
from gemma_encoder.experiments import ablations
from gemma_encoder.experiments.ablations.main_tables import PUBLISHED
from gemma_encoder.experiments.studies import claims, plots, reranking
from gemma_encoder.experiments.studies.results import Results
from gemma_encoder.experiments.studies.statistics import Cell, cells, verdict
from gemma_encoder.experiments.studies.study import MINI, SCALES, Study
from gemma_encoder.inputs import kinds
from gemma_encoder.inputs.errors import InputError

HOW = f"""\
How to read it. A value is the mean ± standard deviation over seeds, of the last step. A difference is to the row in bold, with a 95 %
interval of the paired bootstrap: {RESAMPLES:,} times the same examples (for ranking, queries) and the same seeds are drawn with replacement for
both rows. With three seeds the part of the seeds in an interval is coarse; with one it is missing. "Better" and "worse" are said where the
interval leaves out zero, and many intervals stand here: of twenty true zeros, about one leaves it out. Chance is the best answer that is always the
same, or a random order of the candidates. What was not run says so.
"""


def studies_report(found: Results, output: pathlib.Path, command: str) -> str:
    """The report as markdown; plots are written beside `output`."""
    if not found.done and not found.failed:
        raise InputError("there is no result to report on; run gemma-encoder sweep first")
    studies = ablations.load_studies()
    unknown = sorted({place.study for place in found.done} - set(studies))
    if unknown:
        raise InputError(f"no study is called {unknown[0]!r}; valid: {', '.join(studies)}")
    all_cells = cells(found, studies)
    parts = [f"# Results\n\nWritten by `{command}` from {_runs(found)}\n\n{HOW}"]
    parts += [_claims(all_cells)]
    parts += [
        _study(study, [cell for cell in all_cells if cell.study is study], output)
        for study in studies.values()
        if study.baseline
    ]
    parts += [
        _reranking(all_cells, output),
        _main_tables(studies["main_tables"], all_cells),
        _appendix(found),
    ]
    return "\n".join(filter(None, parts))


def folder_of(output: pathlib.Path) -> pathlib.Path:
    """Where the plots of a report go."""
    return output.with_name(f"{output.stem}_plots")


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return (
        "\n".join(
            [
                *lines,
                *(
                    "| "
                    + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in row)
                    + " |"
                    for row in rows
                ),
            ]
        )
        + "\n"
    )


def format_interval(found: Interval, sign: str = "+") -> str:
    """A value and its bounds."""
    return f"{found.value:{sign}.3f} [{found.low:{sign}.3f}, {found.high:{sign}.3f}]"


def spread(cell: Cell, row: str, metric: str = "") -> str:
    """Mean ± standard deviation over seeds; of one seed its value."""
    values = cell.values(row, metric)
    return (
        f"{values.mean():.3f} ± {values.std(ddof=1):.3f}"
        if len(values) > 1
        else f"{values.mean():.3f}"
    )


def _runs(found: Results) -> str:
    """How many, of what size, how long they took, and on what."""
    runs = [content for content in found.done.values() if "same_as" not in content]
    if not runs:
        return "0 runs. None ended well."
    counted = f"{len(runs)} runs{', some of them rows of several studies' if len(runs) < len(found.done) else ''}"
    machines = sorted({content["machine"] for content in runs})
    versions = sorted(
        {
            ", ".join(f"{name} {version}" for name, version in content["versions"].items())
            for content in runs
        }
    )
    parameters = sorted({content["parameters"] for content in runs})
    size = (
        f"{min(parameters):,} to {max(parameters):,}"
        if len(parameters) > 1
        else f"{parameters[0]:,}"
    )
    hours = sum(content["seconds"] for content in runs) / 3600
    return f"{counted}. Models of {size} parameters; {hours:.1f} hours in all, on: {'; '.join(machines)}. Versions: {'; or '.join(versions)}."


def _claims(all_cells: Sequence[Cell]) -> str:
    lines, details = [], []
    for claim in claims.CLAIMS:
        judged = claims.judge(claim, all_cells)
        lines.append(
            (
                claim.text,
                f"**{claims.overall(claim, judged)}**",
                f"[{claim.study}](#{_anchor(claim.study)})",
            )
        )
        rows = []
        for item in judged:
            if item.difference is None:
                rows.append(
                    (_where(item.cell), str(item.contrast), "not run", "", "—", item.contrast.note)
                )
            else:
                note = item.contrast.note and f"beside the claim: {item.contrast.note}"
                rows.append(
                    (
                        _where(item.cell),
                        str(item.contrast),
                        format_interval(item.difference),
                        str(item.seeds),
                        item.verdict,
                        note,
                    )
                )
        if rows:
            details.append(
                f"{claim.text} {claim.caution}\n\n{markdown_table(('task', 'difference', '95 % interval', 'seeds', 'verdict', ''), rows)}"
            )
    head = "## Claims of the paper\n\nOf arXiv 2503.02656; the last one of RankT5, its baseline. Judged from the intervals at this scale alone.\n"
    return "\n".join([head, markdown_table(("claim", "verdict", "study"), lines), *details])


def _anchor(study: str) -> str:
    return f"study-{study}"


def _where(cell: Cell) -> str:
    return cell.task if cell.scale == MINI else f"{cell.task}, {cell.scale}"


def _study(study: Study, mine: Sequence[Cell], output: pathlib.Path) -> str:
    head = f'<a name="{_anchor(study.name)}"></a>\n\n## Study: {study.name}\n\n{study.question}\n'
    if not mine:
        return f"{head}\nNot run: none of its {len(study.rows_at(MINI))} rows, on none of {', '.join(study.tasks)}.\n"
    parts = [head]
    for scale in sorted({cell.scale for cell in mine}):
        here = [cell for cell in mine if cell.scale == scale]
        drawn = [cell for cell in here if cell.runs]
        if drawn:
            name = study.name if scale == MINI else f"{study.name}_{scale}"
            plots.plot_study(drawn, folder_of(output) / f"{name}.png")
            parts.append(
                f"![{study.name}: mean and 95 % interval of each row, seeds as small dots]({folder_of(output).name}/{name}.png)\n"
            )
        parts += [_cell(cell) for cell in here]
        missing = [task for task in study.tasks if task not in {cell.task for cell in here}]
        if missing:
            parts.append(f"Not run at {scale}: {', '.join(missing)}.\n")
    return "\n".join(parts)


def _cell(cell: Cell) -> str:
    study = cell.study
    head = f"### {study.name}: {_where(cell)}\n"
    if not cell.runs:
        return f"{head}\nEvery run failed: {'; '.join(sorted({reason for seeds in cell.failed.values() for reason in seeds.values()}))}.\n"
    metric = cell.metric
    others = [name for name in cell.example["metrics"] if name != metric]
    rows = []
    for row in study.rows_at(cell.scale):
        name = f"**{row.name}**" if row.name == study.baseline else row.name
        failed = "".join(
            f"; seed {seed} failed: {reason}"
            for seed, reason in cell.failed.get(row.name, {}).items()
        )
        if row.name not in cell.runs:
            rows.append(
                (name, "0", f"failed{failed}" if failed else "not run", *["—"] * (len(others) + 3))
            )
            continue
        seconds = [result["training_seconds"] for result in cell.runs[row.name].values()]
        measured = (
            cell.contrast((row.name,), (study.baseline,)) if row.name != study.baseline else None
        )
        compared = (
            (format_interval(measured[0]), verdict(measured[0]))
            if measured
            else ("", "the baseline" if row.name == study.baseline else "baseline not run")
        )
        values = [spread(cell, row.name, other) for other in others]
        rows.append(
            (
                name,
                str(len(seconds)),
                spread(cell, row.name) + failed,
                *compared,
                *values,
                f"{sum(seconds) / len(seconds):.0f}",
            )
        )
    columns = ("row", "seeds", metric, "difference", "verdict", *others, "training, s")
    return f"{head}\n{_clears_chance(cell)}\n\n{markdown_table(columns, rows)}"


def _clears_chance(cell: Cell) -> str:
    """Whether the baseline is better than knowing nothing, by its interval."""
    baseline, chance = cell.study.baseline, cell.chance()
    if baseline not in cell.runs:
        return "The baseline was not run."
    found = cell.estimate(baseline)
    if chance is None:
        return f"The baseline's {cell.metric} is {format_interval(found, '')}; what chance gives is not known."
    said = (
        "clears chance"
        if found.low > chance
        else "does not clear chance: differences between rows mean little"
    )
    return f"The baseline's {cell.metric} is {format_interval(found, '')}, chance {chance:.3f}: it {said}."


def _reranking(all_cells: Sequence[Cell], output: pathlib.Path) -> str:
    parts, seen = [], set()
    for cell in all_cells:
        if (
            not cell.runs
            or not kinds.get(cell.example["kind"]).ranks
            or "first_stage" not in cell.example["outcomes"][cell.metric]
        ):
            continue
        rows = []
        for row in (row.name for row in cell.study.rows_at(cell.scale) if row.name in cell.runs):
            same = frozenset(result["digest"] for result in cell.runs[row].values())
            if same in seen:
                continue
            seen.add(same)
            found = reranking.compare_to_first_stage(cell, row)
            if row == cell.study.baseline:
                name = (
                    f"reranking_{cell.study.name}{'' if cell.scale == MINI else f'_{cell.scale}'}"
                )
                plots.plot_reranking(found, folder_of(output) / f"{name}.png")
                parts.append(
                    f"![{row} against the first stage, by query, and the interpolation]({folder_of(output).name}/{name}.png)\n"
                )
                parts.append(_extremes(found))
            weights = ", ".join(f"{weight:g}" for weight in found.weights)
            rows.append(
                (
                    f"{cell.study.name} {row}",
                    *(f"{value:.4f}" for value in (found.first_stage, found.reranked)),
                    format_interval(found.gain),
                    f"{found.wins} / {found.ties} / {found.losses}",
                    f"{found.interpolated:.4f}",
                    format_interval(found.interpolated_gain),
                    verdict(found.interpolated_gain),
                    weights,
                )
            )
        columns = (
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
        if rows:
            parts.append(f"{_where(cell)}, MRR@10:\n\n{markdown_table(columns, rows)}")
    if not parts:
        return ""
    head = (
        "## Ranking\n\nThe re-ranker beside the first stage (BM25) whose candidates it orders, by the results' own record of it. Queries won, tied and "
        "lost are counted in every seed. Interpolated: (1 − w) · score + w · (−log rank), both standardised over a query's candidates (the first stage "
        f"gives ranks only, no scores); w is one of 0, 0.1 … 1, chosen for each of {reranking.FOLDS} folds of queries on the other folds, so that no query "
        "chooses its own. Differences are to the first stage.\n"
    )
    return "\n".join([head, *parts])


def _extremes(found: reranking.Comparison, count: int = 5) -> str:
    ordered = sorted(found.differences.items(), key=lambda item: -item[1])
    won, lost = ordered[:count], ordered[::-1][:count]
    text = [", ".join(f"{query} ({value:+.2f})" for query, value in part) for part in (won, lost)]
    return f"Queries of `{found.row}`, by the mean over seeds: most won {text[0]}; most lost {text[1]}.\n"


def _main_tables(study: Study, all_cells: Sequence[Cell]) -> str:
    mine = {(cell.task, cell.scale): cell for cell in all_cells if cell.study is study}
    scales = [scale for scale in SCALES if any(place[1] == scale for place in mine)] or [MINI]

    def value(task: str, scale: str) -> str:
        cell = mine.get((task, scale))
        if cell is None or (not cell.runs and not cell.failed):
            return "not run"
        if not cell.runs:
            return "failed"
        return f"{cell.metric} {spread(cell, scale)} ({len(cell.runs[scale])} seeds)"

    rows = [(task, *(value(task, scale) for scale in scales)) for task in study.tasks]
    rest = [scale for scale in SCALES if scale not in scales]
    published = markdown_table(
        ("benchmark", "split", "model", "published, not measured", "source"), PUBLISHED
    )
    head = f'<a name="{_anchor(study.name)}"></a>\n\n## Main tables\n\n{study.question} Validation splits.\n'
    others = "What others publish for the whole benchmarks, to compare real sizes with; none of it was measured here:\n"
    return "\n".join(
        [
            head,
            markdown_table(("task", *scales), rows),
            f"Not run at all: {', '.join(rest)}.\n",
            others,
            published,
        ]
    )


def _appendix(found: Results) -> str:
    rows = []
    for place, content in sorted(
        found.done.items(),
        key=lambda item: (
            ablations.NAMES.index(item[0].study),
            item[0].scale,
            item[0].task,
            item[0].row,
            item[0].seed,
        ),
    ):
        shared = content.get("same_as")
        rows.append(
            (
                f"{place.study} {place.row}",
                place.task,
                str(place.seed),
                f"{content['metrics'][content['main_metric']]:.4f}",
                f"the run {shared.removesuffix('.json')}"
                if shared
                else _changes(content["changes"]),
                f"{content['training_seconds']:.0f}",
                f"{content['seconds']:.0f}",
                content["date"],
                f"`{content['command']}`",
            )
        )
    failed = [
        (f"{place.study} {place.row}", place.task, str(place.seed), reason)
        for place, reason in found.failed.items()
    ]
    head = "## Every run\n\nChanges are to the recipe of the task and scale. Seconds of training, and of everything: compiling, evaluation, checkpoint.\n"
    columns = (
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
    text = f"{head}\n{markdown_table(columns, rows)}"
    return text + (
        f"\nFailed:\n\n{markdown_table(('row', 'task', 'seed', 'reason'), failed)}"
        if failed
        else ""
    )


def _changes(changes: Mapping[str, object]) -> str:
    return ", ".join(f"{field}={value}" for field, value in changes.items()) or "none"
