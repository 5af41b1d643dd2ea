"""Kinds of task whose examples come in lists that are scored together.

Shapes: N examples, E width of a vector.
"""

import math

import numpy as np

from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.kind import Kind


class Ranking(Kind):
    """Documents of a query, ordered by relevance."""

    name = "ranking"
    default_loss = "softmax"
    default_metrics = ("mrr@10", "ndcg@10")
    is_list = True
    ranks = True
    label_column = "number"
    label_word = "grade"
    least_label = 0.0
    whole_labels = True
    hub_tag = "text-ranking"
    score_meaning = "the relevance by which documents are ranked"

    def check_label(self, task, label, where):
        check_grade(task.name, label, where)
        return float(label)


class Choice(Kind):
    """Multiple choice: options of a question, of which one is correct."""

    name = "choice"
    default_loss = "softmax"
    default_metrics = ("accuracy",)
    is_list = True
    score_meaning = "the score of an option; the highest is the answer"

    def check_label(self, task, label, where):
        if label not in (0, 1):
            raise InputError(
                f"task {task.name!r}, {where}: label {label:g} of an option is out of range; "
                "expected 1 (right) or 0 (wrong)"
            )
        return float(label)


class Retrieval(Kind):
    """Queries and documents as vectors: the results of a query are the nearest documents.

    A training list is a query, then documents. The label of a document is its relevance grade, or
    (grade, score of a teacher); that of a query is 0. In evaluation, queries and documents are
    examples by themselves, and every query searches all documents.
    """

    name = "retrieval"
    head = "embedding"
    default_loss = "info_nce"
    default_metrics = ("ndcg@10", "mrr@10", "recall@100")
    is_list = True
    ranks = True
    embeds = True
    couples = True
    label_column = "number"
    label_word = "grade"
    least_label = 0.0
    whole_labels = True
    hub_tag = "sentence-similarity"
    score_meaning = "the vector of a text, which searches compare"

    def num_outputs(self, task):
        """Returns 0: the head is as wide as the encoder's vectors."""
        return 0

    def target_width(self, task):
        """Returns the width of the vector label, which holds the score of a teacher."""
        return 1

    def check_label(self, task, label, where):
        grade, score = _grade_and_score(label)
        check_grade(task.name, grade, where)
        if not math.isfinite(score):
            raise InputError(
                f"task {task.name!r}, {where}: the teacher's score {score:g} is not finite"
            )
        return float(grade)

    def target(self, task, label, where):
        """Returns the grade, and the score of the teacher, 0 without one."""
        checked = self.check_label(task, label, where)
        return checked, np.array([_grade_and_score(label)[1]], np.float32)

    def postprocess(self, task, scores):
        """Returns the vectors unchanged, [N, E]."""
        return scores

    def word_weights(self, outputs):
        """Returns None: the vectors are dense. See `SparseRetrieval`."""
        return None

    def line(self, task, output, label):
        return {"label": float(label), "prediction": [float(f"{x:.6g}") for x in output]}

    def columns(self, task, outputs):
        """Returns the vectors as lists."""
        return {"prediction": outputs.tolist()}

    def show(self, task, output):
        return f"vector of {len(output)} dimensions"

    def show_label(self, task, label):
        grade, score = _grade_and_score(label)
        return f"{grade:g}, teacher {score:g}" if isinstance(label, tuple) else f"{grade:g}"

    def summarize_labels(self, task, labels):
        return None


class SparseRetrieval(Retrieval):
    """Retrieval by weights of the words of the vocabulary, most of which are 0.

    The outputs of a text are its largest weights, then the ids of their words.
    """

    name = "sparse_retrieval"
    head = "sparse"
    label_column = ""  # files are of kind retrieval, whose options choose the representation
    hub_tag = "feature-extraction"
    score_meaning = "the largest weights of a text, then the ids of their words"

    def word_weights(self, outputs):
        """Returns the weights [N, k] of words and the ids [N, k] of these words."""
        weights, words = np.split(outputs, 2, axis=-1)
        return weights, words.astype(np.int64)

    def show(self, task, output):
        return f"{np.count_nonzero(output[: len(output) // 2])} weighted words"


def check_grade(task: str, grade: float, where: str) -> None:
    """Raises InputError unless a relevance grade is a whole number of at least 0.

    Evaluators count whole grades: a fraction would be trained on, but scored as 0.
    """
    if not (0 <= grade < math.inf and grade == int(grade)):
        raise InputError(
            f"task {task!r}, {where}: relevance grade {grade:g} is not a whole number of at least "
            "0; scale grades such as 0.5 to whole numbers"
        )


def _grade_and_score(label: float | tuple[float, float]) -> tuple[float, float]:
    return label if isinstance(label, tuple) else (label, 0.0)
