"""Lines of a run about its dtype of activations, which it keeps when it resumes elsewhere."""

from collections.abc import Callable

import jax

from gemma_encoder.model import processor
from gemma_encoder.model.config import AUTO
from gemma_encoder.training.build import Recipe

OPTION = f"--config.model.compute_dtype={AUTO}"


def report_dtype(recipe: Recipe, resumes: bool, say: Callable[[str], None]) -> None:
    """Says in a line that bfloat16 is slow here, or that a resumed run keeps another dtype.

    Args:
        recipe: the recipe of the run.
        resumes: True if the run resumes from a checkpoint.
        say: prints a line.
    """
    dtype = recipe.encoder.compute_dtype
    fastest = processor.fastest_dtype(jax.default_backend())
    is_slow = dtype == "bfloat16" != fastest
    origin = f"the run was started with {dtype}, and continues with it"
    if is_slow and resumes:
        processor.report_slow(f"{origin}. {processor.SLOW}; a new run with {OPTION} is faster", say)
    elif is_slow:
        processor.report_slow(f"{processor.SLOW}; {OPTION} chooses {fastest}", say)
    elif resumes and recipe.config.model.compute_dtype == AUTO and dtype != fastest:
        say(f"{origin}; a new run on this machine would choose {fastest}")


def describe_dtype(recipe: Recipe) -> str:
    """Returns the dtype of activations, with the reason where "auto" chose float32 on this CPU."""
    dtype = recipe.encoder.compute_dtype
    is_auto = recipe.config.model.compute_dtype == AUTO
    if is_auto and dtype == "float32" == processor.fastest_dtype(jax.default_backend()):
        return f"{dtype}, as {processor.NO_BFLOAT16}"
    return dtype
