"""The Kneser-Ney trigram: values computed by hand, and probabilities that sum to one."""

import numpy as np
import pytest

from gemma_encoder.experiments.pretraining.ngram import Trigram

EOS = 1
BOS = 2
A = 3
B = 4
C = 5
TEXTS = [np.array(text) for text in ([BOS, A, B, 1], [BOS, A, C, 1], [BOS, B, 1])]


def test_values_equal_those_computed_by_hand():
    """Counts of the three levels and their discounts.

    Trigrams, without those of first tokens: (bos a b), (bos a c), (a b eos), (a c eos) and
    (bos b eos), once each: D₃ = 5 / 5 = 1.
    Pairs: (bos a) occurs twice, (bos b) once; (a b), (a c) and (c eos) have one distinct preceding
    token, (b eos) has two, bos and a: D₂ = 4 / (4 + 2·2) = 1/2.
    Tokens by distinct preceding tokens: a 1, b 2, c 1, eos 2: D₁ = 2 / (2 + 2·2) = 1/3.
    """
    model = Trigram(TEXTS, 8, BOS)
    np.testing.assert_allclose(
        [model._trigram.discount, model._bigram.discount, model._unigram.discount],
        [1.0, 1 / 2, 1 / 3],
    )
    unigram = {
        token: (max(count - 1 / 3, 0) + 1 / 3 * 4 / 8) / 6
        for token, count in {A: 1, B: 2, C: 1, EOS: 2, 6: 0}.items()
    }
    # p(a | bos): 3 texts, 2 distinct first tokens.
    first = (2 - 1 / 2 + 1 / 2 * 2 * unigram[A]) / 3
    # p(c | bos a) = p(c | a): the counts of both trigrams after (bos a) are discounted to 0.
    second = (1 - 1 / 2 + 1 / 2 * 2 * unigram[C]) / 2
    # p(eos | a c) = p(eos | c): the count of (a c eos) is discounted to 0.
    last = 1 - 1 / 2 + 1 / 2 * 1 * unigram[EOS]
    np.testing.assert_allclose(model.probabilities([TEXTS[1]]), [first, second, last])
    np.testing.assert_allclose(model.perplexity([TEXTS[1]]), (first * second * last) ** (-1 / 3))
    # 6 and 7 are in no text: after them, probabilities are those of the level below.
    unseen = model.probabilities([np.array([BOS, 6, 7, EOS])])
    np.testing.assert_allclose(unseen[0], (1 / 2 * 2 * unigram[6]) / 3)
    np.testing.assert_allclose(unseen[2], unigram[EOS])


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


def test_training_texts_have_lower_perplexity():
    texts = [np.array([BOS, A, B, C, 1])] * 50 + [np.array([BOS, C, B, A, 1])] * 50
    model = Trigram(texts, 8000, BOS)
    assert model.perplexity(texts[:1]) < 1.5 < model.perplexity([np.array([BOS, A, B, A, 1])])
