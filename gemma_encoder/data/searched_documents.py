"""Choice of the documents that the queries of an evaluation search."""

import numpy as np
from absl import logging

from gemma_encoder.data.source import Source


def searched_documents(
    source: Source, split: str, queries: int, relevant: np.ndarray, total: int
) -> np.ndarray:
    """Returns the documents to search, in their order; logs if they are not all.

    Args:
        source: the task; its options say how many documents are searched.
        split: the evaluated split.
        queries: number of queries, for the log.
        relevant: indices of the documents that are relevant for a query, which are never left out.
        total: number of documents.

    Returns:
        [n] int32, indices from 0 to `total` - 1, ascending.
    """
    size = source.options.retrieval.eval_documents or total
    if size >= total:
        return np.arange(total, dtype=np.int32)
    relevant = np.unique(np.asarray(relevant, np.int32))
    others = np.setdiff1d(np.arange(total, dtype=np.int32), relevant)
    others = np.random.default_rng(source.key).permutation(others)
    documents = np.sort(np.concatenate([relevant, others[: max(size - len(relevant), 0)]]))
    documents = documents.astype(np.int32)
    if len(documents) == total:
        return documents
    logging.warning(
        "%s: the %d queries of %s search %d of %d documents, the relevant ones and random others: "
        "metrics are higher than on the whole collection (retrieval.eval_documents)",
        source.task.name,
        queries,
        split,
        len(documents),
        total,
    )
    return documents
