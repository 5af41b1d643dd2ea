"""The Kneser-Ney trigram: values worked by hand, and probabilities that sum to one after any context."""

import numpy as np
import pytest

from gemma_encoder.experiments.pretraining.ngram import Trigram

BOS, A, B, C = 2, 3, 4, 5
TEXTS = [np.array(text) for text in ([BOS, A, B, 1], [BOS, A, C, 1], [BOS, B, 1])]


def test_values_are_those_worked_by_hand():
    """Pairs and the tokens that stand before them: (bos a) 2 times and (bos b) 1 time, counted as they occur; (a b), (a c), (c eos) after 1
    token; (b eos) after 2, bos and a. So D₂ = 4 / (4 + 2·2) = 1/2. Tokens after different ones: a 1, b 2, c 1, eos 2: D₁ = 2 / (2 + 2·2) = 1/3.
    Trigrams, without those of a first token: (bos a b), (bos a c), (a b eos), (a c eos), (bos b eos), once each: D₃ = 5 / 5 = 1.
    """
    model = Trigram(TEXTS, 8, BOS)
    np.testing.assert_allclose(
        [model._three.discount, model._two.discount, model._one.discount], [1.0, 1 / 2, 1 / 3]
    )
    one = {
        token: (max(count - 1 / 3, 0) + 1 / 3 * 4 / 8) / 6
        for token, count in {A: 1, B: 2, C: 1, 1: 2, 6: 0}.items()
    }
    first = (2 - 1 / 2 + 1 / 2 * 2 * one[A]) / 3  # after bos: 3 texts, 2 kinds of first token
    second = (
        1 - 1 / 2 + 1 / 2 * 2 * one[C]
    ) / 2  # p(c | a); after (bos a) all of the two trigrams' count is discounted
    last = 1 - 1 / 2 + 1 / 2 * 1 * one[1]  # p(eos | c), of which (a c eos) is discounted wholly
    np.testing.assert_allclose(model.probabilities([TEXTS[1]]), [first, second, last])
    np.testing.assert_allclose(model.perplexity([TEXTS[1]]), (first * second * last) ** (-1 / 3))
    never = model.probabilities(
        [np.array([BOS, 6, 7, 1])]
    )  # 6 and 7 are in no text: what follows them is left to the level below
    np.testing.assert_allclose(never[0], (1 / 2 * 2 * one[6]) / 3)
    np.testing.assert_allclose(never[2], one[1])


@pytest.mark.parametrize("context", [[BOS], [BOS, A], [A, B], [B, A], [C, 6], [6, 7]])
def test_probabilities_sum_to_one(context):
    rng = np.random.default_rng(0)
    texts = [
        np.concatenate([[BOS], rng.integers(3, 6, rng.integers(1, 6)), [1]]) for _ in range(40)
    ]
    model = Trigram(texts, 8, BOS)
    before = context if context[0] == BOS else [BOS, *context]
    after = [model.probabilities([np.array([*before, word])])[-1] for word in range(8)]
    assert min(after) > 0
    np.testing.assert_allclose(sum(after), 1)


def test_it_prefers_what_it_has_read():
    texts = [np.array([BOS, A, B, C, 1])] * 50 + [np.array([BOS, C, B, A, 1])] * 50
    model = Trigram(texts, 8000, BOS)
    assert model.perplexity(texts[:1]) < 1.5 < model.perplexity([np.array([BOS, A, B, A, 1])])
