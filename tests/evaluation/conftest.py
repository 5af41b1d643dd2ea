"""Builders of tasks, outputs and tables of examples."""

import numpy as np

from gemma_encoder.inputs.task import Example, ExampleTable, Task
from gemma_encoder.inputs.template import Template


def task(kind, names, **fields):
    if kind == "classification":
        fields["classes"] = ("a", "b")
    return Task("t", kind, Template("{x}"), tuple(names), **fields)


def one_hot(classes):
    return np.eye(2)[classes]


def table(labels, queries=None, documents=None, infos=None):
    result = ExampleTable()
    for index, label in enumerate(labels):
        query = queries[index] if queries else ""
        document = documents[index] if documents else ""
        info = infos[index] if infos else {}
        result.add(Example({"x": "x"}, float(label), query, document, info))
    return result
