"""Mines hard negatives: documents that a run ranks high and that no judgment calls relevant.

    gemma-encoder mine --run=run.trec --qrels=qrels.train.tsv --output=negatives.tsv

The output is a run (qid, pid, rank), which --config.ranking.run=negatives.tsv trains on. Documents
that score above --max_share of a query's best positive are left out: many are unlabeled positives.
"""

import pathlib
import re
from collections.abc import Sequence

from gemma_encoder import activity, terminal
from gemma_encoder.cli import commandline
from gemma_encoder.inputs.errors import InputError


def main(argv: Sequence[str]) -> int:
    """Runs the program and returns its exit code."""
    return commandline.run_program(lambda: _main(argv))


def _main(argv: Sequence[str]) -> int:
    flags = commandline.Flags(__doc__)
    flags.text("run", "TREC run (.trec of search), or MS MARCO run (qid, pid, rank).")
    flags.text("qrels", "Relevance grades of the training queries.")
    flags.text("output", "File to write.")
    flags.text("ranks", "First and last rank that are used.", "1-100")
    flags.real(
        "max_share",
        "Leave out documents that score above this share of the query's best positive; by default "
        "0.95 if the run has scores.",
    )
    flags.text("queries", "If given, the file that must have all queries of the run.")
    flags.text("collection", "If given, the file that must have all documents of the run.")
    flags.parse(argv)
    run = flags.required("run", "name a run, such as the output of gemma-encoder search")
    qrels = flags.required("qrels", "name a file of judgments")
    output = flags.required("output", "name a .tsv file")
    ranks = re.fullmatch(r"([1-9]\d{0,8})-([1-9]\d{0,8})", flags["ranks"])
    if not ranks:
        raise InputError(f"--ranks={flags['ranks']}: expected FIRST-LAST, such as 1-100")
    from gemma_encoder.retrieval import mining

    with activity.during("reading the run"):
        report = mining.mine(
            pathlib.Path(run),
            pathlib.Path(qrels),
            pathlib.Path(output),
            (int(ranks[1]), int(ranks[2])),
            flags["max_share"],
            *(
                pathlib.Path(flags[name]) if flags[name] else None
                for name in ("queries", "collection")
            ),
        )
    share = mining.MAX_SHARE if flags["max_share"] is None else flags["max_share"]
    first, *others = report.lines(share)
    terminal.print_note(f"wrote {output}, {first}")
    for line in others:
        terminal.print_note(line)
    return 0
