"""Lengths of training in the user's unit: "500 steps", "3 epochs", "20000 examples", "10 percent"."""

import dataclasses
import math
import re

from gemma_encoder.inputs.errors import InputError, unknown

UNITS = ("steps", "epochs", "examples", "percent")
LONGEST = 1e15  # of any unit; what is longer is a slip of the keyboard
NUMERAL = r"[0-9]+(?:\.[0-9]*)?|\.[0-9]+"


@dataclasses.dataclass(frozen=True)
class Duration:
    """A length of training, e.g. Duration(3.0, "epochs")."""

    value: float
    unit: str

    @classmethod
    def parse(cls, text: str | int, field: str) -> "Duration":
        """Reads "3 epochs", ".5 Epochs", "10%", or a bare number of steps.

        Args:
            text: a number and a unit, in the singular or the plural, in either case.
            field: name of the config's field, for messages.

        Raises:
            InputError: no such text, an unknown unit, or a number beyond any training.
        """
        match = re.fullmatch(
            rf"\s*((?:{NUMERAL})(?:[eE][+-]?[0-9]+)?)\s*(%|[a-zA-Z]*)\s*", str(text)
        )
        if not match:
            raise InputError(
                f"{field}={text!r} is no duration; write a number of at least 0 and one of "
                f"{', '.join(UNITS)}, e.g. '3 epochs'"
            )
        value, unit = float(match[1]), match[2].lower() or "steps"
        unit = "percent" if unit == "%" else unit if unit in UNITS else f"{unit}s"
        if unit not in UNITS:
            raise unknown(f"unit in {field}={text!r}", match[2], UNITS)
        if value > LONGEST:
            raise InputError(f"{field}={text!r} is longer than any training; write e.g. '3 epochs'")
        return cls(value, unit)

    def steps(self, examples_per_step: int, epoch: int, total: int | None = None) -> int:
        """The duration in steps, at least 1 unless it is zero.

        Args:
            examples_per_step: examples of a step.
            epoch: examples of an epoch.
            total: steps of the whole training, of which a percentage is taken.

        Raises:
            InputError: a percentage where `total` is not given.
        """
        if not self.value:
            return 0
        if self.unit == "percent":
            if total is None:
                raise InputError("train_for cannot be given in percent")
            # Rounded up: 50 percent is due twice, not a third time just before the end.
            return max(math.ceil(self.value / 100 * total), 1)
        unit = {"steps": examples_per_step, "epochs": epoch, "examples": 1}[self.unit]
        return max(round(unit * self.value / examples_per_step), 1)
