"""Durations in the user's unit: "500 steps", "3 epochs", "20000 examples", "10 percent"."""

import dataclasses
import math
import re

from gemma_encoder.inputs.errors import InputError, unknown

UNITS = ("steps", "epochs", "examples", "percent")
LONGEST = 1e15  # in any unit; a longer duration is a typo
NUMERAL = r"[0-9]+(?:\.[0-9]*)?|\.[0-9]+"


@dataclasses.dataclass(frozen=True)
class Duration:
    """Length of training, e.g. Duration(3.0, "epochs")."""

    value: float
    unit: str

    @classmethod
    def parse(cls, text: str | int, field: str) -> "Duration":
        """Parses "3 epochs", ".5 Epochs", "10%", or a bare number of steps.

        Args:
            text: a number and a unit, singular or plural, in upper or lower case.
            field: name of the config field, for messages.

        Raises:
            InputError: the text is not a duration, the unit is unknown, or the number is too large.
        """
        match = re.fullmatch(
            rf"\s*((?:{NUMERAL})(?:[eE][+-]?[0-9]+)?)\s*(%|[a-zA-Z]*)\s*", str(text)
        )
        if not match:
            raise InputError(
                f"{field}={text!r} is not a duration; write a number of at least 0 and one of "
                f"{', '.join(UNITS)}, e.g. '3 epochs'"
            )
        value = float(match[1])
        unit = match[2].lower() or "steps"
        if unit == "%":
            unit = "percent"
        elif unit not in UNITS:
            unit = f"{unit}s"
        if unit not in UNITS:
            raise unknown(f"unit in {field}={text!r}", match[2], UNITS)
        if value > LONGEST:
            raise InputError(f"{field}={text!r} is longer than any training; write e.g. '3 epochs'")
        return cls(value, unit)

    def steps(self, examples_per_step: int, epoch: int, total: int | None = None) -> int:
        """Converts the duration to steps: at least 1, unless the duration is zero.

        Args:
            examples_per_step: examples per step.
            epoch: examples per epoch.
            total: steps of the whole training, to which a percentage refers.

        Raises:
            InputError: the duration is a percentage and `total` is not given.
        """
        if not self.value:
            return 0
        if self.unit == "percent":
            if total is None:
                raise InputError("train_for cannot be given in percent")
            # Rounded up, so that "50 percent" is due twice, not also just before the end.
            return max(math.ceil(self.value / 100 * total), 1)
        examples = {"steps": examples_per_step, "epochs": epoch, "examples": 1}[self.unit]
        return max(round(examples * self.value / examples_per_step), 1)
