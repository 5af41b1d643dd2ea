"""Interpolated Kneser-Ney trigram model of token ids, a baseline for language models.

    p(w | u v) = max(c(u v w) − D, 0) / c(u v ·) + D · types(u v ·) / c(u v ·) · p(w | v)

and likewise for lower levels, down to the uniform distribution over the vocabulary. Each level has
one discount, D = n₁ / (n₁ + 2 n₂), or 1/2 if no count is 1 (Chen and Goodman 1998, sections 2.7 and
3). Below trigrams, c counts distinct preceding tokens, not occurrences, except after bos, which has
no preceding token. A text's first token is predicted by the bigram, since its context is only bos.

Shapes: N distinct pairs, M predictions, V vocabulary size.
"""

from collections.abc import Sequence

import numpy as np


class Level:
    """Discounted probabilities of words after contexts, both as integers.

    Args:
        contexts, words: [N], distinct pairs.
        counts: [N], count of each pair.
        vocabulary: V.
    """

    def __init__(
        self, contexts: np.ndarray, words: np.ndarray, counts: np.ndarray, vocabulary: int
    ):
        once = int((counts == 1).sum())
        twice = int((counts == 2).sum())
        self.discount = once / (once + 2 * twice) if once else 0.5
        keys = contexts * vocabulary + words
        order = np.argsort(keys)
        self.vocabulary = vocabulary
        self.keys = keys[order]
        self.counts = counts[order]
        self.contexts, inverse = np.unique(contexts, return_inverse=True)
        self.totals = np.bincount(inverse, weights=counts)
        self.types = np.bincount(inverse)

    def __call__(self, contexts: np.ndarray, words: np.ndarray, lower: np.ndarray) -> np.ndarray:
        """Returns probabilities [M], interpolated with `lower` [M], those of the level below.

        After an unseen context, they are those of the level below.
        """
        context, is_seen = _lookup(self.contexts, contexts)
        pair, has_count = _lookup(self.keys, contexts * self.vocabulary + words)
        count = np.where(has_count, self.counts[pair], 0)
        totals = np.where(is_seen, self.totals[context], 1)
        discounted = np.maximum(count - self.discount, 0)
        backoff = self.discount * self.types[context] * lower
        return np.where(is_seen, (discounted + backoff) / totals, lower)


class Trigram:
    """Trigram model of texts.

    Args:
        texts: token ids, bos and eos included.
        vocabulary: V; ids are below it, and probabilities after a context sum to 1 over 0 … V − 1.
        bos: first id of every text.
    """

    def __init__(self, texts: Sequence[np.ndarray], vocabulary: int, bos: int):
        self.vocabulary = vocabulary
        before, middle, last = _trigrams(texts, vocabulary)
        complete = before < vocabulary  # not a text's first token, which follows bos alone
        triples, triple_counts = np.unique(
            (before[complete] * vocabulary + middle[complete]) * vocabulary + last[complete],
            return_counts=True,
        )
        pairs, occurrences = np.unique(middle * vocabulary + last, return_counts=True)
        # The number of distinct tokens before each pair; after bos, the number of occurrences.
        predecessors = np.bincount(
            np.searchsorted(pairs, triples % vocabulary**2), minlength=len(pairs)
        )
        pair_counts = np.where(pairs // vocabulary == bos, occurrences, predecessors)
        words, word_counts = np.unique(pairs % vocabulary, return_counts=True)
        self._trigram = Level(
            triples // vocabulary, triples % vocabulary, triple_counts, vocabulary
        )
        self._bigram = Level(pairs // vocabulary, pairs % vocabulary, pair_counts, vocabulary)
        self._unigram = Level(np.zeros_like(words), words, word_counts, vocabulary)

    def probabilities(self, texts: Sequence[np.ndarray]) -> np.ndarray:
        """Returns the probability of every token but bos, in the order of the texts."""
        before, middle, last = _trigrams(texts, self.vocabulary)
        uniform = np.full(len(last), 1 / self.vocabulary)
        unigram = self._unigram(np.zeros_like(last), last, uniform)
        bigram = self._bigram(middle, last, unigram)
        trigram = self._trigram(before * self.vocabulary + middle, last, bigram)
        return np.where(before < self.vocabulary, trigram, bigram)

    def perplexity(self, texts: Sequence[np.ndarray]) -> float:
        """Returns exp of the mean negative log-likelihood of all tokens but bos."""
        return float(np.exp(-np.log(self.probabilities(texts)).mean()))


def _lookup(values: np.ndarray, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the index of each query in sorted values, and whether the value is present."""
    index = np.minimum(np.searchsorted(values, queries), len(values) - 1)
    return index, values[index] == queries


def _trigrams(
    texts: Sequence[np.ndarray], vocabulary: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns every token but bos as (second last token, last token, token).

    The second last token before a text's first token is V, a placeholder.
    """
    tokens = np.concatenate([np.append(vocabulary, text) for text in texts]).astype(np.int64)
    positions = np.concatenate([np.arange(-1, len(text)) for text in texts])
    predicted = np.flatnonzero(positions > 0)
    return tokens[predicted - 2], tokens[predicted - 1], tokens[predicted]
