"""HTML page of the report: its sections and its style sheet."""

import pathlib
from collections.abc import Callable, Sequence

from gemma_encoder.inputs.untrusted import html_text
from gemma_encoder.report import calibration, comparison, overview, predictions
from gemma_encoder.report.runs import RunFiles, unique_names
from gemma_encoder.report.scoring import score

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body {
  font: 15px/1.45 system-ui, sans-serif;
  margin: 0 auto;
  padding: 12px 16px 60px;
  max-width: 1500px;
}
h1 { font-size: 1.5em }
h2 { font-size: 1.2em; margin-top: 2em; border-bottom: 1px solid var(--line) }
h3 { font-size: 1em; margin-bottom: .3em }
.scroll { overflow-x: auto; max-width: 100% }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td {
  text-align: left;
  padding: 3px 12px 3px 0;
  vertical-align: top;
  border-bottom: 1px solid var(--line)
}
td.number, th.number { text-align: right; white-space: nowrap }
td.text { min-width: 220px; max-width: 60ch; overflow-wrap: anywhere }
td.cell { text-align: center; padding: 8px 12px; border: 1px solid var(--line) }
code, pre { font-size: .9em; overflow-wrap: anywhere; white-space: pre-wrap }
.muted { opacity: .7 }
.plots {
  display: grid;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 400px), 1fr));
  gap: 12px
}
.plot { width: 100%; height: auto }
.plot text { fill: currentColor }
.title { font: 600 14px system-ui }
.tick { font: 12px system-ui }
.end { text-anchor: end }
.middle { text-anchor: middle }
.grid { stroke: currentColor; stroke-opacity: .18 }
.key { margin-right: 18px; white-space: nowrap }
"""


def render_report(workdirs: Sequence[pathlib.Path]) -> str:
    """Renders the page about some runs; raises InputError if a workdir is not that of a run."""
    names = unique_names(workdirs)
    runs = [
        RunFiles.load(pathlib.Path(workdir), name)
        for workdir, name in zip(workdirs, names, strict=True)
    ]
    title = html_text(f"Report on {', '.join(names)}")
    body = "".join(
        f"<section><h2>{name}</h2>{content}</section>"
        for name, content in _sections(runs).items()
        if content
    )
    head = (
        '<meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style>"
    )
    page = (
        f'<!doctype html><html lang="en"><head>{head}</head>'
        f"<body><h1>{title}</h1>{body}</body></html>\n"
    )
    return page.encode(errors="backslashreplace").decode()  # names of files may be no Unicode


def _sections(runs: Sequence[RunFiles]) -> dict[str, str]:
    """Returns the sections by title; a section without content is empty."""
    several = len(runs) > 1
    colors = {run.name: index for index, run in enumerate(runs)}
    scored = {run.name: score(run) for run in runs}

    def per_run(section: Callable[[RunFiles, bool], str]) -> str:
        return "".join(section(run, several) for run in runs)

    return {
        "Runs": overview.runs_section(runs),
        "What differs": overview.differences_section(runs) if several else "",
        "Curves": overview.curves_section(runs, colors),
        "Metrics": comparison.metrics_section(runs, scored),
        "Classes": per_run(predictions.classes_section),
        "Confusion": per_run(predictions.confusion_section),
        "Calibration": per_run(calibration.calibration_section),
        "Worst mistakes": per_run(predictions.mistakes_section),
        "Against the first stage": per_run(predictions.first_stage_section),
        "Throughput": overview.throughput_section(runs),
    }
