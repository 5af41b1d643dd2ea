"""InputError, and the message for an unknown name."""

import errno

import pytest

from gemma_encoder.inputs import errors
from gemma_encoder.inputs.errors import InputError, in_one_line, one_line, unknown


def test_unknown_names_the_nearest_and_every_valid_name():
    message = str(unknown("pooler", "men", ("mean", "last_k", "first_k")))
    assert message == "unknown pooler 'men'; did you mean 'mean'? Valid: first_k, last_k, mean"


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("glue_sst", "glue_sst2"), ("sst2", "glue_sst2"), ("glue_mlni", "glue_mnli")],
)
def test_unknown_prefers_the_closest_name(name, nearest):
    assert f"did you mean {nearest!r}?" in str(
        unknown("task", name, ("glue_sst2", "glue_mnli", "msmarco"))
    )


def test_unknown_suggests_nothing_if_no_name_is_similar():
    message = str(unknown("pooler", "zzzzzz", ("mean", "last_k")))
    assert "did you mean" not in message
    assert message == "unknown pooler 'zzzzzz'. Valid: last_k, mean"


def test_unknown_accepts_names_that_are_not_strings():
    assert "unknown layer 'None'" in str(unknown("layer", None, ("local", "global")))


def test_an_input_error_is_a_value_error_of_one_line():
    error = unknown("task", "a", ("b",))
    assert isinstance(error, InputError)
    assert isinstance(error, ValueError)
    assert "\n" not in str(error)


def test_unknown_without_valid_names():
    assert str(unknown("hook", "trace", ())) == "unknown hook 'trace'. Valid: none"


def test_only_the_last_component_of_a_path_is_compared():
    names = ["own.train", "own.template", "own.label"]
    assert "did you mean 'own.train'?" in str(unknown("config field", "own.trian", names))
    assert "did you mean" not in str(unknown("config field", "own.xyz", names))


def test_a_notebook_shows_one_line():
    assert InputError("a is not b")._render_traceback_() == ["InputError: a is not b"]


def test_an_error_of_the_system_is_its_message():
    error = OSError(errno.ENOSPC, "No space left on device", "runs/a")
    assert one_line(error) == "[Errno 28] No space left on device: 'runs/a'"
    assert one_line(OSError("Traceback (most recent call last):\nValueError: no such model")) == (
        "no such model"
    )
    assert one_line(KeyError("name")) == "name"


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("two\nlines"), "two lines"),
        (OSError(errno.EIO, "Input/output error", "file"), "Input/output error"),
        (KeyError(), "KeyError"),
        (ValueError("bad [tensorstore_spec='{}']"), "bad"),
        (ValueError("x" * 1000), "x" * 300 + " …"),
    ],
)
def test_an_error_of_a_library_is_one_line(error, text):
    with pytest.raises(InputError) as caught, in_one_line("F cannot be read", "copy it again"):
        raise error
    assert str(caught.value) == f"F cannot be read: {text}; copy it again"
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (MemoryError("Unable to allocate 8 GiB"), True),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8589934592 bytes."), True),
        (ValueError("RESOURCE_EXHAUSTED: Failed writing: x [os_error_code='28'] [source"), False),
        (ValueError("INTERNAL: no such block"), False),
    ],
)
def test_too_little_memory_is_not_taken_for_damage(error, is_memory):
    with pytest.raises(InputError) as caught, in_one_line("F cannot be read", "copy it again"):
        raise error
    assert ("copy it again" in str(caught.value)) is not is_memory
    assert str(caught.value).endswith(errors.TOO_LARGE) is is_memory


def test_errors_of_other_types_pass_unchanged():
    with pytest.raises(KeyError), in_one_line("F cannot be written", errors=OSError):
        raise KeyError("x")


def test_refusals_and_interruptions_pass_unchanged():
    for error in (InputError("refused"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught, in_one_line("F cannot be read"):
            raise error
        assert caught.value is error


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        OSError(28, "Error writing bytes. Detail: [errno 28] No space left on device"),
        ValueError("Failed writing: x: No space left on device [os_error_code='28'] [source …"),
    ],
)
def test_a_full_disk_has_the_same_reason_in_every_library(error):
    assert errors.reason(error) == "No space left on device"
