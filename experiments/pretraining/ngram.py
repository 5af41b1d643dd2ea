"""What a language model is measured against: an interpolated Kneser-Ney trigram over token ids.

p(w | u v) = max(c(u v w) − D, 0) / c(u v ·) + D · types(u v ·) / c(u v ·) · p(w | v), and so on down to the uniform distribution over the
vocabulary, with one discount a level, D = n₁ / (n₁ + 2 n₂), 1/2 where nothing was counted once (Chen and Goodman 1998, sections 2.7 and 3).
Below the trigrams, c counts the different tokens that stand before, not the occurrences; what begins with bos has none before it, so there
it counts occurrences. Of a text's first token, only bos is known: it is predicted by the bigram.
"""

from collections.abc import Sequence

import numpy as np


class Level:
    """Discounted probabilities of one level: of w after a context, both as integers.

    Args:
        contexts, words: [N], pairs that differ.
        counts: [N] of each.
        vocabulary: how many words there are.
    """

    def __init__(
        self, contexts: np.ndarray, words: np.ndarray, counts: np.ndarray, vocabulary: int
    ):
        once, twice = int((counts == 1).sum()), int((counts == 2).sum())
        self.discount = once / (once + 2 * twice) if once else 0.5
        keys = contexts * vocabulary + words
        order = np.argsort(keys)
        self.vocabulary, self.keys, self.counts = vocabulary, keys[order], counts[order]
        self.contexts, inverse = np.unique(contexts, return_inverse=True)
        self.totals = np.bincount(inverse, weights=counts)
        self.types = np.bincount(inverse)

    def __call__(self, contexts: np.ndarray, words: np.ndarray, lower: np.ndarray) -> np.ndarray:
        """[M] probabilities, interpolated with those of the level below, `lower`; those themselves where the context was never seen."""
        place, seen = _find(self.contexts, contexts)
        pair, met = _find(self.keys, contexts * self.vocabulary + words)
        count = np.where(met, self.counts[pair], 0)
        totals = np.where(seen, self.totals[place], 1)
        mine = (
            np.maximum(count - self.discount, 0) + self.discount * self.types[place] * lower
        ) / totals
        return np.where(seen, mine, lower)


class Trigram:
    """The model of some texts.

    Args:
        texts: token ids, bos and eos included.
        vocabulary: V, above every id; all probabilities after a context sum to one over 0 … V − 1.
        bos: the id that every text begins with.
    """

    def __init__(self, texts: Sequence[np.ndarray], vocabulary: int, bos: int):
        self.vocabulary = vocabulary
        before, middle, last = _trigrams(texts, vocabulary)
        whole = before < vocabulary  # the others are a text's first token after bos alone
        triples, counts = np.unique(
            (before[whole] * vocabulary + middle[whole]) * vocabulary + last[whole],
            return_counts=True,
        )
        pairs, occurrences = np.unique(middle * vocabulary + last, return_counts=True)
        different = np.bincount(
            np.searchsorted(pairs, triples % vocabulary**2), minlength=len(pairs)
        )
        different = np.where(pairs // vocabulary == bos, occurrences, different)
        followers, kinds = np.unique(pairs % vocabulary, return_counts=True)
        self._three = Level(triples // vocabulary, triples % vocabulary, counts, vocabulary)
        self._two = Level(pairs // vocabulary, pairs % vocabulary, different, vocabulary)
        self._one = Level(np.zeros_like(followers), followers, kinds, vocabulary)

    def probabilities(self, texts: Sequence[np.ndarray]) -> np.ndarray:
        """Of every token but bos, text after text."""
        before, middle, last = _trigrams(texts, self.vocabulary)
        one = self._one(np.zeros_like(last), last, np.full(len(last), 1 / self.vocabulary))
        two = self._two(middle, last, one)
        return np.where(
            before < self.vocabulary, self._three(before * self.vocabulary + middle, last, two), two
        )

    def perplexity(self, texts: Sequence[np.ndarray]) -> float:
        """exp of the mean negative log-likelihood of the texts' tokens, bos apart."""
        return float(np.exp(-np.log(self.probabilities(texts)).mean()))


def _find(known: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A place in the sorted `known` for each of `wanted`, and whether it stands there."""
    place = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
    return place, known[place] == wanted


def _trigrams(
    texts: Sequence[np.ndarray], vocabulary: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(two before, one before, token) of every token but bos; two before the first there is nothing, which is V."""
    tokens = np.concatenate([np.append(vocabulary, text) for text in texts]).astype(np.int64)
    inside = np.concatenate(
        [np.arange(-1, len(text)) for text in texts]
    )  # place in the text, from 0
    chosen = np.flatnonzero(inside > 0)
    return tokens[chosen - 2], tokens[chosen - 1], tokens[chosen]
