"""Runs an encoder over texts: tokenization, packing into rows, and a forward pass per batch."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent import futures

import jax
import numpy as np
import tqdm
from absl import logging
from jax.sharding import Mesh

from gemma_encoder import activity
from gemma_encoder.evaluation.forward import (
    ForwardOutput,
    compile_forward,
    report_slow_dtype,
    shard_batch,
)
from gemma_encoder.inputs.batch import Batch, BatchShape, empty_batch
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.packing import Packer, PackingGroup, Segment
from gemma_encoder.inputs.template import EncodedText, Template, encode
from gemma_encoder.weights.native import InferenceSpec

# Rows of a batch. Each number of them is a program, which takes seconds to compile on a first start
# and some 0.2 s to trace and load on others. On CPUs larger batches are no faster.
ROWS = (1, 8, 32)
ROWS_ON_CPU = (1, 8)
MAX_ROWS = max(ROWS)
SHORTEST_ROW = 128  # tokens; the block size of attention kernels on accelerators
SHORT_TEXT = 64  # tokens; a row of its own length for a single short text, on CPUs
TOKENIZED_AT_ONCE = 4096  # texts
COMPILED_AT_ONCE = 2  # programs; tracing takes turns, and each is compiled in several threads
PROGRESS_DELAY = 2.0  # seconds of work before a progress bar appears


class TextEncoder:
    """Runs an encoder over texts, which are packed into shared rows; results keep their order.

    Batches have 1, 8 or, on accelerators, 32 rows, or multiples of the devices where there are
    several. The row length is training's, divided by 4 down to 128 tokens while the longest text
    fits, for a single row by 2; on a CPU, a text of up to 64 tokens alone has a row of 64. So few
    programs are compiled, however many texts there are.

    Args:
        spec: the inference spec.
        parameters: nested dict, as returned by `backbone.load_encoder`.
        mesh: the mesh over which rows are sharded.

    Attributes:
        truncated: a number to which those of truncated texts are added, which are then not
            reported call by call; None to report them.
    """

    def __init__(self, spec: InferenceSpec, parameters: dict, mesh: Mesh):
        self.spec = spec
        self.parameters = parameters
        self.mesh = mesh
        self._forward = compile_forward(spec.encoder, mesh)
        self._on_cpu = mesh.devices.flat[0].platform == "cpu"
        self._compiled: set[tuple[int, ...]] = set()  # shapes
        self.truncated: int | None = None

    def run(
        self,
        template: Template,
        texts: Sequence[Mapping[str, str]],
        names: Sequence[str] | None,
        progress: bool,
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Encodes texts.

        Args:
            template: formats the fields of a text.
            texts: the fields of each text.
            names: names of the texts in messages; by default "text 0", "text 1", …
            progress: show a progress bar if the work takes long.

        Returns:
            Pooled states [N, D], and scores [N, C] by head, in the order of the texts.

        Raises:
            InputError: there is no text, or one of them is invalid.
        """
        encoder = self.spec.encoder
        encoded = self._encode(template, texts, names, progress)
        report_slow_dtype(encoder, self.mesh)
        shape = self._shape([len(text.tokens) for text in encoded])
        pooled = np.empty((len(texts), encoder.pooled_dim), np.float32)
        scores = {
            name: np.empty((len(texts), head.outputs), np.float32)
            for name, head in encoder.heads.items()
        }
        running: tuple[Batch, ForwardOutput] | None = None
        with _progress_bar("encoding", len(texts), progress) as bar:
            for batch in self._batches(encoded, shape):
                # Dispatch this batch before the previous one is fetched, to keep the device busy.
                previous = running
                running = (batch, self._start(batch))
                if previous is not None:
                    bar.update(_fetch(*previous, pooled, scores))
            if running is not None:
                bar.update(_fetch(*running, pooled, scores))
        return pooled, scores

    def warm_up(self, max_rows: int = MAX_ROWS, progress: bool = False) -> int:
        """Compiles every program that texts may need and returns their number.

        Args:
            max_rows: the largest batch to compile for; 1 suffices for single short requests.
            progress: show a progress bar.
        """
        report_slow_dtype(self.spec.encoder, self.mesh)
        shapes = self._shapes(max_rows)
        self._compiled.update((shape.rows, shape.row_length) for shape in shapes)
        description = activity.during(f"compiling the forward pass for {len(shapes)} shapes")
        with description, futures.ThreadPoolExecutor(COMPILED_AT_ONCE) as pool:
            programs = pool.map(lambda shape: self._start(empty_batch(shape)), shapes)
            bar = tqdm.tqdm(
                programs, "compiling", len(shapes), unit=" programs", disable=not progress
            )
            for outputs in bar:
                jax.block_until_ready(outputs)
        return len(shapes)

    def _start(self, batch: Batch) -> ForwardOutput:
        """Dispatches the forward pass; does not wait for it."""
        shape = batch.tokens.shape
        with contextlib.ExitStack() as stack:
            if shape not in self._compiled:
                rows, length = shape
                program = f"compiling the forward pass of {rows} x {length} tokens"
                stack.enter_context(activity.during(program))
            self._compiled.add(shape)
            return self._forward(self.parameters, shard_batch(batch, self.mesh))

    def _encode(
        self,
        template: Template,
        texts: Sequence[Mapping[str, str]],
        names: Sequence[str] | None,
        progress: bool,
    ) -> list[EncodedText]:
        """Tokenizes all texts, so that an invalid one fails before the model runs."""
        if not len(texts):
            raise InputError("there is no text to encode; give at least one")
        max_length = self.spec.max_length
        names = names or [f"text {index}" for index in range(len(texts))]
        encoded: list[EncodedText] = []
        with _progress_bar("tokenizing", len(texts), progress) as bar:
            for start in range(0, len(texts), TOKENIZED_AT_ONCE):
                part = slice(start, start + TOKENIZED_AT_ONCE)
                encoded += encode(
                    self.spec.tokenizer, template, texts[part], max_length, names[part]
                )
                bar.update(len(encoded) - start)
        num_truncated = sum(text.num_truncated > 0 for text in encoded)
        if self.truncated is None:
            self.report_truncated(num_truncated, len(texts))
        else:
            self.truncated += num_truncated
        return encoded

    def report_truncated(self, count: int, total: int) -> None:
        """Warns of truncated texts, if there are any."""
        if count:
            logging.warning(
                "%d of %d texts exceed max_length=%d tokens and were truncated",
                count,
                total,
                self.spec.max_length,
            )

    def _rows(self) -> list[int]:
        """Returns the possible numbers of rows, ascending: multiples of the devices."""
        devices = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        counts = ROWS_ON_CPU if self._on_cpu else ROWS
        return sorted({-(-count // devices) * devices for count in counts})

    def _lengths(self, fewest: bool = True) -> list[int]:
        """Returns the possible row lengths in tokens, longest first.

        Args:
            fewest: for batches of the fewest rows; others, which several texts share, have every
                second length.
        """
        lengths = [self.spec.row_length]
        while lengths[-1] > SHORTEST_ROW:
            part = -(-lengths[-1] // (2 if fewest else 4))
            lengths.append(-(-part // SHORTEST_ROW) * SHORTEST_ROW)
        return lengths

    def _has_short_row(self) -> bool:
        """Returns True if a single short text has a row of `SHORT_TEXT` tokens."""
        return self._on_cpu and self._rows()[0] == 1 and self._lengths()[-1] > SHORT_TEXT

    def _shapes(self, max_rows: int = MAX_ROWS) -> list[BatchShape]:
        """Returns every batch shape of up to `max_rows` rows, or of the fewest possible."""
        fewest, *counts = self._rows()
        shapes = [_batch_shape(fewest, length) for length in self._lengths()]
        if self._has_short_row():
            shapes.append(_batch_shape(1, SHORT_TEXT))
        return shapes + [
            _batch_shape(rows, length)
            for rows in counts
            if rows <= max_rows
            for length in self._lengths(fewest=False)
        ]

    def _shape(self, lengths: Sequence[int]) -> BatchShape:
        """Returns the batch shape for texts of these lengths.

        Rows are the shortest that hold the longest text. Their number is the largest of which texts
        fill more than half; fewer texts than that take several smaller batches.
        """
        longest = max(lengths)
        if len(lengths) == 1 and longest <= SHORT_TEXT and self._has_short_row():
            return _batch_shape(1, SHORT_TEXT)
        fewest, *counts = self._rows()
        row_length = min(length for length in self._lengths(fewest=False) if length >= longest)
        filled = -(-sum(lengths) // row_length)
        rows = max((rows for rows in counts if 2 * filled > rows), default=fewest)
        if rows == fewest:
            row_length = min(length for length in self._lengths() if length >= longest)
        return _batch_shape(rows, row_length)

    def _batches(self, encoded: Sequence[EncodedText], shape: BatchShape) -> Iterator[Batch]:
        """Packs texts into batches; `example_id` is a text's index."""
        packer = Packer(shape, self.spec.padding)
        for index, text in enumerate(encoded):
            packer.add(PackingGroup((Segment(text.tokens, 0, 0.0, index),)))
            while packer.ready:
                yield packer.emit()
        while len(packer):
            yield packer.emit()


def _batch_shape(rows: int, length: int) -> BatchShape:
    return BatchShape(rows, length, max(length // 8, 1))


def _fetch(
    batch: Batch, output: ForwardOutput, pooled: np.ndarray, scores: dict[str, np.ndarray]
) -> int:
    """Waits for a batch's output, writes it to its texts' rows, and returns their number."""
    vectors, values = jax.device_get((output.pooled, output.scores))
    is_real = batch.weight > 0
    ids = batch.example_id[is_real]
    pooled[ids] = vectors[is_real]
    for name, head_scores in values.items():
        scores[name][ids] = head_scores[is_real]
    return len(ids)


def _progress_bar(title: str, total: int, enabled: bool) -> tqdm.tqdm:
    return tqdm.tqdm(
        desc=title,
        total=total,
        unit=" texts",
        disable=not enabled,
        delay=PROGRESS_DELAY,
        dynamic_ncols=True,
    )
