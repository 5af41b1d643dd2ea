"""Searches an index for the queries of a file and writes a run.

    gemma-encoder search --index=INDEX --queries=queries.dev.tsv --k=100 --output=run.trec
    gemma-encoder search --index=INDEX,BM25 --queries=queries.dev.tsv --output=run.trec \\
      --qrels=qrels.dev.tsv

Several indexes of one collection are fused by reciprocal ranks. With --qrels the run is evaluated.
"""

import pathlib
from collections.abc import Sequence

from gemma_encoder import activity, terminal
from gemma_encoder.cli import commandline
from gemma_encoder.inputs.errors import InputError


def main(argv: Sequence[str]) -> int:
    """Runs the program and returns its exit code."""
    return commandline.run_program(lambda: _main(argv))


def _main(argv: Sequence[str]) -> int:
    flags = commandline.Flags(__doc__)
    flags.words("index", "Folder of an index, or several to fuse.")
    flags.text("model", "The model that encodes queries; by default the path in the index.")
    flags.text("queries", ".tsv file (id and query), or .jsonl file (_id and text).")
    flags.whole("k", "Results of each query.", 100, 1)
    flags.text("output", ".trec file for a TREC run, or .tsv for an MS MARCO run.")
    flags.text("qrels", "Relevance grades: print recall@100, mrr@10 and ndcg@10.")
    flags.text("baseline", "TREC run of the same queries: print differences to its metrics, too.")
    flags.real("fusion_constant", "Of reciprocal rank fusion: 1 / (constant + rank).", 60.0, 0.0)
    flags.modules()
    flags.parse(argv)
    if not flags["index"]:
        raise InputError("--index is missing: name the folder of an index")
    queries = flags.required("queries", "name a .tsv or .jsonl file")
    output = flags.required("output", "name a .trec or .tsv file")
    with activity.starting("opening the index"):
        from gemma_encoder.evaluation.details import format_bounds, format_metric
        from gemma_encoder.retrieval.index import Index
        from gemma_encoder.retrieval.search_file import search_file

    summary = search_file(
        [Index.load(folder, flags["model"]) for folder in flags["index"]],
        pathlib.Path(queries),
        pathlib.Path(output),
        flags["k"],
        flags["fusion_constant"],
        *(pathlib.Path(flags[name]) if flags[name] else None for name in ("qrels", "baseline")),
    )
    terminal.print_note(f"wrote {output}, {summary.queries} queries")
    for name, interval in summary.metrics.items():
        bounds = format_bounds(name, interval[1:])
        line = f"{name:<10} {format_metric(name, interval.value)} ({bounds})"
        if change := summary.differences.get(name):
            value, low, high = (format_metric(name, item, "+") for item in change)
            line += f"  {value} ({low} to {high}) to {flags['baseline']}"
        terminal.print_result(line)
    return 0
