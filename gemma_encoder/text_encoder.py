"""Texts to pooled states and scores: tokens, shared rows, one forward pass after the other."""

from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np
import tqdm
from absl import logging
from jax.sharding import Mesh

from gemma_encoder.evaluation.forward import compile_forward, shard_batch
from gemma_encoder.inputs.batch import BatchShape, empty_batch
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.packing import Packer, PackingGroup, Segment
from gemma_encoder.inputs.template import EncodedText, Template, encode
from gemma_encoder.weights.native import InferenceSpec

MAX_ROWS = 32  # of a batch, which has a power of two of them
SHORTEST_ROW = 128  # tokens; attention on accelerators works on blocks of so many
CHUNK = 4096  # texts that are tokenized at a time
PATIENCE = 2.0  # seconds of work before a progress bar appears


class TextEncoder:
    """Runs an encoder over texts, which share rows; results come in the order of the texts.

    Rows are as long as training's, or halved to a multiple of 128 tokens as often as the longest
    text at hand allows. However many texts there are, one program is compiled for each such length
    and each power of two up to 32 rows (fewer on several devices).

    Args:
        bundle: everything but the parameters.
        parameters: nested dict, as `backbone.load_encoder` gives it.
        mesh: what rows are spread over.
    """

    def __init__(self, spec: InferenceSpec, parameters: dict, mesh: Mesh):
        self.spec, self.parameters, self.mesh = spec, parameters, mesh
        self._forward = compile_forward(spec.encoder, mesh)

    def run(
        self,
        template: Template,
        texts: Sequence[Mapping[str, str]],
        names: Sequence[str] | None,
        progress: bool,
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Pooled states [N, D] and scores [N, C] of each head, in the order of the texts.

        Args:
            template: makes a text of fields.
            texts: the fields of each.
            names: what the texts are called in messages; by default "text 0", "text 1", …
            progress: show a bar on long work.
        """
        spec = self.spec
        encoded = self._encode(template, texts, names, progress)
        shape = self._shape([len(text.tokens) for text in encoded])
        pooled = np.empty((len(texts), spec.encoder.pooled_dim), np.float32)
        scores = {
            name: np.empty((len(texts), head.outputs), np.float32)
            for name, head in spec.encoder.heads.items()
        }
        with _bar("encoding", len(texts), progress) as bar:
            running = None
            for batch in self._batches(encoded, shape):
                # One batch is worked on while the one before it is fetched.
                before, running = running, (batch, self._start(batch))
                bar.update(_fetch(before, pooled, scores))
            bar.update(_fetch(running, pooled, scores))
        return pooled, scores

    def warm_up(self, max_rows: int = MAX_ROWS, progress: bool = False) -> int:
        """Compiles every program that texts may need, and returns how many there are.

        Args:
            max_rows: of batches to compile for; 1 for single short requests.
            progress: show a bar.
        """
        smallest = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        limit = max(max_rows, smallest)
        rows = [smallest << power for power in range(16) if smallest << power <= limit]
        shapes = [_batch_shape(count, length) for length in self._lengths() for count in rows]
        for shape in tqdm.tqdm(shapes, "compiling", unit=" programs", disable=not progress):
            jax.block_until_ready(self._start(empty_batch(shape)))
        return len(shapes)

    def _start(self, batch):
        return self._forward(self.parameters, shard_batch(batch, self.mesh))

    def _encode(
        self,
        template: Template,
        texts: Sequence[Mapping[str, str]],
        names: Sequence[str] | None,
        progress: bool,
    ) -> list[EncodedText]:
        """The tokens of every text; all are checked before the model is asked for the first."""
        if not len(texts):
            raise InputError("there is no text to encode; give at least one")
        tokenizer, max_length = self.spec.tokenizer, self.spec.max_length
        names = names or [f"text {index}" for index in range(len(texts))]
        encoded: list[EncodedText] = []
        with _bar("tokenizing", len(texts), progress) as bar:
            for start in range(0, len(texts), CHUNK):
                part = slice(start, start + CHUNK)
                encoded += encode(tokenizer, template, texts[part], max_length, names[part])
                bar.update(len(encoded) - start)
        truncated = sum(text.num_truncated > 0 for text in encoded)
        if truncated:
            logging.warning(
                "%d of %d texts exceed max_length=%d tokens and were truncated",
                truncated,
                len(texts),
                max_length,
            )
        return encoded

    def _lengths(self) -> list[int]:
        """The lengths that rows may have, the longest first."""
        lengths = [self.spec.row_length]
        while lengths[-1] % (2 * SHORTEST_ROW) == 0:
            lengths.append(lengths[-1] // 2)
        return lengths

    def _shape(self, lengths: Sequence[int]) -> BatchShape:
        """The batches for texts of so many tokens: rows as short and as few as will do."""
        longest, tokens = max(lengths), sum(lengths)
        length = min(length for length in self._lengths() if length >= longest)
        rows = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        while rows < MAX_ROWS and rows * length < tokens:
            rows *= 2
        return _batch_shape(rows, length)

    def _batches(self, encoded: Sequence[EncodedText], shape: BatchShape) -> Iterator:
        """The texts packed into batches; `example_id` is a text's index."""
        packer = Packer(shape, self.spec.padding)
        for index, text in enumerate(encoded):
            packer.add(PackingGroup((Segment(text.tokens, 0, 0.0, index),)))
            while packer.ready:
                yield packer.emit()
        while len(packer):
            yield packer.emit()


def _batch_shape(rows: int, length: int) -> BatchShape:
    return BatchShape(rows, length, max(length // 8, 1))


def _fetch(running, pooled: np.ndarray, scores: dict[str, np.ndarray]) -> int:
    """Waits for a batch's output and sorts it in; returns the number of texts."""
    if running is None:
        return 0
    batch, output = running[0], jax.device_get(running[1])
    real = batch.weight > 0
    ids = batch.example_id[real]
    pooled[ids] = output.pooled[real]
    for name, head in output.scores.items():
        scores[name][ids] = head[real]
    return len(ids)


def _bar(title: str, total: int, shown: bool) -> tqdm.tqdm:
    return tqdm.tqdm(
        desc=title,
        total=total,
        unit=" texts",
        disable=not shown,
        delay=PATIENCE,
        dynamic_ncols=True,
    )
