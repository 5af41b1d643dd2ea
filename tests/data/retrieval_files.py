"""Small folders for retrieval in the layouts of MS MARCO and BEIR, and streams over them."""

import json

import numpy as np

from gemma_encoder.data import registry
from gemma_encoder.data.list_retrieval import ListRetrievalSource
from gemma_encoder.data.memory import MemorySource
from gemma_encoder.data.retrieval import retrieval_task
from gemma_encoder.data.retrieval_options import RetrievalOptions
from gemma_encoder.data.source import DataOptions
from gemma_encoder.inputs.task import Example

QUERIES, DOCUMENTS = 12, 40


def positives(query):
    """Returns {document: grade} of a query; every third one has two relevant documents."""
    return {query: 1 + query % 2} | ({query + 20: 1} if query % 3 == 0 else {})


def candidates(query):
    """Returns documents of a first stage, best first, with a positive of the query among them."""
    return [(query + 7 * rank) % DOCUMENTS for rank in range(8)]


def text_of(document):
    return f"document {document} " + "word " * (document % 5)


def _tsv(rows):
    return "".join("\t".join(map(str, row)) + "\n" for row in rows)


def _trec(split, scores):
    return "".join(
        f"{split}{query} Q0 d{document} {rank} {scores(query, rank)} other\n"
        for query in range(QUERIES)
        for rank, document in enumerate(candidates(query), 1)
    )


def write_msmarco(folder, run=True, scores=lambda query, rank: 10 - rank):
    """Writes a folder for MSMARCO_DIR; its runs have scores, so they are TREC runs."""
    documents = [(f"d{index}", text_of(index)) for index in range(DOCUMENTS)]
    files = {"collection.tsv": _tsv(documents)}
    for split in ("train", "dev"):
        ids = [f"{split}{query}" for query in range(QUERIES)]
        files[f"queries.{split}.tsv"] = _tsv((i, f"query {i}") for i in [*ids, f"{split}none"])
        judgments = [
            (ids[query], 0, f"d{document}", grade)
            for query in range(QUERIES)
            for document, grade in [*positives(query).items(), (39, 0)]
        ]
        files[f"qrels.{split}.tsv"] = _tsv(judgments)
        if run:
            files[f"run.{split}.tsv"] = _trec(split, scores)
    for name, content in files.items():
        (folder / name).write_text(content)


def write_beir(folder):
    """Writes the dataset scifact for BEIR_DIR, with titles and without a run."""
    (folder / "scifact" / "qrels").mkdir(parents=True)
    corpus = [{"_id": f"d{i}", "title": f"t{i}", "text": text_of(i)} for i in range(DOCUMENTS)]
    queries = [{"_id": f"q{i}", "text": f"query {i}"} for i in range(QUERIES)]
    for name, rows in (("corpus", corpus), ("queries", queries)):
        content = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "scifact" / f"{name}.jsonl").write_text(content)
    judgments = [(f"q{i}", f"d{d}", g) for i in range(QUERIES) for d, g in positives(i).items()]
    for split in ("train", "test"):
        content = _tsv([("query-id", "corpus-id", "score"), *judgments])
        (folder / "scifact" / "qrels" / f"{split}.tsv").write_text(content)


def options(limits=None, **retrieval):
    """Returns data options; `limits` are those outside of `retrieval`."""
    return DataOptions(retrieval=RetrievalOptions(**retrieval), **(limits or {}))


def marco(limits=None, **retrieval):
    """Returns the source of MSMARCO_DIR."""
    source = registry.get("msmarco_retrieval", options(limits, **retrieval))
    source.check()
    return source


def taught_lists(split):
    """Returns lists with the scores of a teacher that no short decimal is."""
    rng = np.random.default_rng(len(split))
    return [
        [
            Example(
                {"query": f"query {i}", "document": f"document {(i + 3 * j) % 17}"},
                (float(j == 0), float(rng.normal())),
                f"q{i}",
                f"d{(i + 3 * j) % 17}",
            )
            for j in range(5)
        ]
        for i in range(15 if split == "train" else 8)
    ]


def taught(name="taught", **retrieval):
    """Returns a retrieval task in memory, with a teacher."""
    data = options(**{"positives": 1, "negatives": 2} | retrieval)
    task = retrieval_task(name, data)
    lists = MemorySource(task, data, taught_lists)
    lists.has_teacher = True
    return ListRetrievalSource(task, data, lists)
