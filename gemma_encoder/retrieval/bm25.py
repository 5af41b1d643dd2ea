"""BM25 by the package bm25s, whose files are in INDEX/bm25.

Words are runs of letters and digits, in lower case; no word is left out or stemmed. The scores are
Lucene's.
"""

import logging
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from gemma_encoder.inputs.errors import InputError, in_one_line
from gemma_encoder.retrieval.description import IndexDescription
from gemma_encoder.retrieval.top import Best, largest, merge, nothing
from gemma_encoder.runtime import require_retrieval

FOLDER = "bm25"
WORD = re.compile(r"[^\W_]+")
METHOD = "lucene"


def write_bm25(
    folder: pathlib.Path,
    texts: Iterator[str],
    description: IndexDescription,
    advance: Callable[[int], object],
) -> None:
    """Writes the index of texts to a folder; the words of all texts are in memory.

    Args:
        folder: of the index.
        texts: the documents.
        description: of the index.
        advance: is called with numbers of documents.
    """
    bm25s = _package()
    vocabulary: dict[str, int] = {}
    documents = []
    for text in texts:
        words = words_of(text)
        documents.append([vocabulary.setdefault(word, len(vocabulary)) for word in words])
        advance(1)
    if not vocabulary:
        raise InputError(f"{description.collection}: no document has a word, which BM25 needs")
    model = bm25s.BM25(k1=description.k1, b=description.b, method=METHOD)
    with in_one_line("BM25's index cannot be built"):
        model.index((documents, vocabulary), show_progress=False)
        model.save(folder / FOLDER, show_progress=False)


def words_of(text: str) -> list[str]:
    """Returns the words of a text, in lower case."""
    return WORD.findall(text.lower())


def _package():
    """Imports bm25s, which would otherwise log what it does."""
    require_retrieval("bm25s")
    import bm25s

    logging.getLogger("bm25s").setLevel(logging.WARNING)
    return bm25s


class Bm25:
    """An index that `write_bm25` wrote, memory-mapped.

    Args:
        folder: of the index.

    Raises:
        InputError: a file is missing or damaged.
    """

    def __init__(self, folder: pathlib.Path):
        bm25s = _package()
        with in_one_line(f"{folder / FOLDER} cannot be read", "index the collection again"):
            self._model = bm25s.BM25.load(folder / FOLDER, mmap=True)

    def search(self, queries: Sequence[str], k: int, advance: Callable[[int], object]) -> Best:
        """Returns the k best documents that share a word; ties in the documents' order.

        Args:
            queries: Q texts.
            k: number of results.
            advance: is called with 1 after each query.
        """
        best = nothing(len(queries), k)
        for index, query in enumerate(queries):
            words = self._model.get_tokens_ids(words_of(query))
            if words:
                scores = self._model.get_scores_from_ids(words)
                order = largest(np.asarray(scores), k)
                merge(best, index, order, scores[order])
            advance(1)
        return best
