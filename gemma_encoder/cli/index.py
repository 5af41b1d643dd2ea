"""Indexes a collection of documents for gemma-encoder search.

    gemma-encoder index --model=runs/retriever --collection=collection.tsv --output=INDEX
    gemma-encoder index --kind=bm25 --collection=collection.tsv --output=BM25

Collections are .tsv files of id and passage, as MS MARCO's, or .jsonl files, as BEIR's; also
compressed. If a run is interrupted, rerun the command to resume.
"""

import pathlib
from collections.abc import Sequence

from gemma_encoder import activity, terminal
from gemma_encoder.cli import commandline

KINDS = ("dense", "sparse", "bm25")


def main(argv: Sequence[str]) -> int:
    """Runs the program and returns its exit code."""
    return commandline.run_program(lambda: _main(argv))


def _main(argv: Sequence[str]) -> int:
    flags = commandline.Flags(__doc__)
    flags.text("model", "Folder of a run, one of its checkpoints, or an export.")
    flags.text("collection", ".tsv file (id and passage), or .jsonl file (_id, title, text).")
    flags.text("output", "New folder for the index.")
    flags.text("task", "Task whose templates format texts; by default the only one with roles.")
    flags.choice("kind", "By default that of the model; bm25 needs no model.", KINDS, None)
    flags.whole("width", "First dimensions of the vectors to store; by default all.", None, 1)
    flags.choice("precision", "Of the stored vectors.", ("float32", "int8"), "float32")
    flags.choice(
        "approximate", "Build an index of FAISS for approximate search, too.", ("hnsw", "ivf"), None
    )
    flags.real("k1", "Of BM25.", 0.9, 0.0)
    flags.real("b", "Of BM25.", 0.4, 0.0)
    flags.whole("block", "Documents of a block, which a killed run encodes anew.", 4096, 1)
    flags.modules()
    flags.parse(argv)
    collection = flags.required("collection", "name a .tsv or .jsonl file")
    output = flags.required("output", "name a new folder")
    if flags["kind"] != "bm25":
        flags.required("model", "name the folder of a run, or use --kind=bm25")
    with activity.starting("loading the model"):
        from gemma_encoder import distributed
        from gemma_encoder.retrieval.index import Index

        distributed.initialize()
    names = ("task", "kind", "width", "precision", "k1", "b", "block")
    options = {name: flags[name] for name in names}
    options["approximate"] = flags["approximate"] or ""
    index = Index.build(flags["model"], pathlib.Path(collection), pathlib.Path(output), **options)
    if distributed.is_main_process():
        terminal.print_note(f"wrote {output}, {len(index)} documents")
    return 0
