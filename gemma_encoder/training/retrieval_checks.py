"""Checks of retrieval tasks before the first step."""

from collections.abc import Sequence

from gemma_encoder.data.source import Source
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.model.config import EncoderConfig
from gemma_encoder.training.losses import LossOptions
from gemma_encoder.training.retrieval_losses import NEED_TEACHER


def check_retrieval(sources: Sequence[Source], losses: LossOptions, encoder: EncoderConfig) -> None:
    """Raises InputError if the loss of a retrieval task does not fit its data or its vectors.

    Args:
        sources: the tasks with their data.
        losses: constants of the loss.
        encoder: config of the model.
    """
    widths = losses.options.retrieval.widths
    for source in sources:
        task = source.task
        if not task.kind.embeds:
            continue
        loss = losses.name(task.kind)
        if loss in NEED_TEACHER and not source.has_teacher:
            raise InputError(
                f"task {task.name!r}: the loss {loss!r} compares with the scores of a teacher, "
                "which its training data do not have; choose another loss"
            )
        if not widths:
            continue
        if task.kind.head != "embedding":
            raise InputError(
                f"task {task.name!r}: loss_options.retrieval.widths are for dense vectors; leave "
                "them out for sparse ones"
            )
        width = encoder.heads[task.head].outputs
        if max(widths) >= width:
            raise InputError(
                f"task {task.name!r}: loss_options.retrieval.widths must be below the width of the "
                f"vectors, {width}; got {widths}"
            )
