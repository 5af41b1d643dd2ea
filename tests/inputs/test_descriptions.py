"""Descriptions: JSON round trips, and errors that name unknown and missing fields."""

import dataclasses
import json

import pytest

from gemma_encoder.inputs.descriptions import from_fields
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.task import Task
from gemma_encoder.inputs.template import Template

TASK = Task(
    "search",
    "ranking",
    Template("Query: {query} Document: {document}"),
    role_templates=(("query", Template("query: {query}")), ("document", Template("{document}"))),
)


def test_a_task_with_roles_survives_json():
    assert Task.from_dict(json.loads(json.dumps(TASK.to_dict()))) == TASK
    assert TASK.template_for("query").text == "query: {query}"
    assert TASK.template_for("") is TASK.template


@pytest.mark.parametrize("part", [(), ("template",)])
def test_a_field_of_a_newer_version_is_refused(part):
    values = TASK.to_dict()
    target = values
    for name in part:
        target = target[name]
    target["temperature"] = 1
    with pytest.raises(InputError, match=r"has the field 'temperature'.*a newer version wrote it"):
        Task.from_dict(values)


def test_a_missing_field_is_named():
    @dataclasses.dataclass
    class Two:
        a: int
        b: tuple = ()

    assert from_fields(Two, {"a": 1, "b": [[1], 2]}, "two").b == ((1,), 2)
    with pytest.raises(InputError, match="the description of two lacks the field 'a'"):
        from_fields(Two, {"b": []}, "two")


def test_an_unknown_role_is_refused():
    with pytest.raises(InputError, match="did you mean 'query'"):
        Task("t", "ranking", Template("{x}"), role_templates=(("qery", Template("{x}")),))
