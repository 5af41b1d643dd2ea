"""Reciprocal rank fusion of several rankings (Cormack, Clarke and Büttcher, 2009)."""

from collections.abc import Sequence

from gemma_encoder.inputs.errors import InputError

CONSTANT = 60

Ranking = Sequence[tuple[str, float]]  # (id, score), best first


def fuse_rankings(
    rankings: Sequence[Sequence[Ranking]], k: int, constant: float = CONSTANT
) -> list[list[tuple[str, float]]]:
    """Fuses rankings of the same queries: a document's score is Σ 1 / (constant + rank).

    Args:
        rankings: one ranking per query, from each system.
        k: number of results.
        constant: larger ones weigh the first ranks less.

    Returns:
        Per query (id, score), best first; documents with equal scores in the order in which the
        systems name them.

    Raises:
        InputError: the constant is negative, or the systems have other numbers of queries.
    """
    if constant < 0:
        raise InputError(f"the constant of a fusion is at least 0, got {constant}")
    if len({len(of_system) for of_system in rankings}) > 1:
        raise InputError("rankings to fuse must be of the same queries")
    fused = []
    for of_query in zip(*rankings, strict=True):
        scores: dict[str, float] = {}
        for ranking in of_query:
            for rank, (document, _) in enumerate(ranking, 1):
                scores[document] = scores.get(document, 0.0) + 1 / (constant + rank)
        fused.append(sorted(scores.items(), key=lambda item: -item[1])[:k])
    return fused
