"""One random encoder for both arms: ours, and the same weights in Hugging Face transformers.

The peer loads the export that ours writes. Frameworks are imported inside functions, so that each
is loaded only in the arm that uses it. Shapes: B rows, L tokens.
"""

import json
import multiprocessing
import pathlib
import shutil
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from gemma_encoder.inputs.json_text import to_json

if TYPE_CHECKING:
    from gemma_encoder.inputs.batch import Batch

TASK = "glue_sst2"


def write(
    folder: pathlib.Path, size: str, max_length: int, task: str = TASK, pooling: str = "mean"
) -> None:
    """Exports a random encoder of a published size to a folder, in a process of its own.

    It has the head of one task, by default two classes on mean pooling.
    """
    in_a_process(_write, folder, size, max_length, task, pooling)


def in_a_process(function: Callable[..., None], *arguments: Any) -> None:
    """Calls a function that writes a model in a process of its own."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(
            f"writing the model failed with exit code {process.exitcode}; see its traceback above"
        )


def _write(folder: pathlib.Path, size: str, max_length: int, name: str, pooling: str) -> None:
    import jax

    import gemma_encoder as ge
    from gemma_encoder.data import registry
    from gemma_encoder.model.encoder import initial_parameters
    from gemma_encoder.weights.native import InferenceSpec

    task = registry.get(name).task
    config = ge.EncoderConfig(
        ge.GEMMA_CONFIGS[size],
        {task.head: task.num_outputs},
        pooling=ge.PoolingConfig(pooling),
        compute_dtype="float32",
    )
    row_length = -(-max_length // 128) * 128
    spec = InferenceSpec(
        config, (task,), ge.Tokenizer.load("small"), max_length, row_length, "right", 0
    )
    parameters = initial_parameters(config, jax.random.key(0))
    ge.export_huggingface(ge.Predictor(spec, parameters), folder)


def write_embedder(folder: pathlib.Path, size: str, max_length: int) -> None:
    """Exports a random encoder without heads: mean pooling, vectors of length 1."""
    in_a_process(_write_embedder, folder, size, max_length)


def _write_embedder(folder: pathlib.Path, size: str, max_length: int) -> None:
    import jax

    import gemma_encoder as ge
    from gemma_encoder.model.encoder import initial_parameters
    from gemma_encoder.weights.native import InferenceSpec

    pooling = ge.PoolingConfig("mean", normalize=True)
    config = ge.EncoderConfig(ge.GEMMA_CONFIGS[size], {}, pooling=pooling, compute_dtype="float32")
    row_length = -(-max_length // 128) * 128
    tokenizer = ge.Tokenizer.load("small")
    spec = InferenceSpec(config, (), tokenizer, max_length, row_length, "right", 0)
    parameters = initial_parameters(config, jax.random.key(0))
    ge.export_huggingface(ge.Predictor(spec, parameters), folder)


def as_sequence_classifier(export: pathlib.Path, folder: pathlib.Path, labels: int) -> None:
    """Converts an export to transformers' `Gemma…ForSequenceClassification`.

    CrossEncoder and Trainer take this format. Its `score` layer is linear on the last token and has
    no bias, so the head's bias must be zero, as it is in a fresh head.

    Raises:
        ValueError: the head is not linear to `labels` outputs, or its bias is not zero.
    """
    import safetensors.numpy

    folder.mkdir()
    for file in export.iterdir():
        if file.name.startswith("tokenizer"):
            shutil.copy(file, folder)
    config = json.loads((export / "config.json").read_text())
    architecture = {
        "gemma2": "Gemma2ForSequenceClassification",
        "gemma3_text": "Gemma3TextForSequenceClassification",
    }[config["model_type"]]
    config |= {
        "id2label": {str(label): str(label) for label in range(labels)},
        "label2id": {str(label): label for label in range(labels)},
        "architectures": [architecture],
    }
    (folder / "config.json").write_text(to_json(config))
    head = safetensors.numpy.load_file(next(export.glob("*_Dense/model.safetensors")))
    weight = head["linear.weight"]
    if weight.shape[0] != labels or head["linear.bias"].any():
        raise ValueError(f"the head must be linear to {labels} without a bias, got {weight.shape}")
    tensors = {"score.weight": weight}
    for file in export.glob("model*.safetensors"):
        for name, value in safetensors.numpy.load_file(file).items():
            tensors[f"model.{name}"] = value
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def attention(folder: pathlib.Path) -> str:
    """Returns transformers' best attention implementation that needs only PyTorch.

    That is sdpa, or eager for models with a soft cap, which sdpa does not support.
    """
    config = json.loads((folder / "config.json").read_text())
    return "eager" if config.get("attn_logit_softcapping") else "sdpa"


def full_batch(tokens: np.ndarray, labels: np.ndarray) -> "Batch":
    """Returns our batch of one text per row, without padding.

    Args:
        tokens: token ids [B, L], int32.
        labels: class indices [B].
    """
    from gemma_encoder.inputs.batch import BatchShape, empty_batch

    rows, length = tokens.shape
    return empty_batch(BatchShape(rows, length))._replace(
        tokens=tokens,
        segment_ids=np.ones_like(tokens),
        positions=np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape),
        label=labels[:, None].astype(np.float32),
        weight=np.ones((rows, 1), np.float32),
    )


def our_program(
    folder: pathlib.Path,
    rows: int,
    row_length: int,
    segments: int,
    examples_per_step: int,
    dtype: str,
    remat: str = "none",
) -> tuple[Any, Any]:
    """Builds our training program and its state from the export's weights.

    AdamW at a constant learning rate, no dropout, one device.
    """
    import jax

    from gemma_encoder.model import sharding
    from gemma_encoder.training import recipe
    from gemma_encoder.training.build import build
    from gemma_encoder.training.state import initial_state
    from gemma_encoder.training.step import make_program
    from gemma_encoder.weights.backbone import load_encoder

    mesh = sharding.make_mesh((1, 1, 1), jax.devices()[:1])
    spec, parameters = load_encoder(folder, mesh)
    config = recipe.default_config()
    config.tasks = (TASK,)
    config.batch.rows = rows
    config.batch.row_length = row_length
    config.batch.segments = segments
    config.batch.examples_per_step = examples_per_step
    config.max_length = row_length
    changes = {"compute_dtype": dtype, "remat": remat, "feed_forward_dropout": 0.0}
    config.model.update(changes)
    config.optimizer.learning_rate = 1e-5
    config.optimizer.schedule = "constant"
    built = build(config, dry=True)
    encoder = spec.encoder.__class__.from_dict(spec.encoder.to_dict() | changes)
    built = built.__class__(**{**vars(built), "encoder": encoder})
    program = make_program(built, mesh, total=1_000_000, warmup=0)
    state = initial_state(encoder, program.optimizer, mesh, 0, parameters, program.is_trainable)
    return program, state


class TorchEncoder:
    """The peer: transformers' model with mean pooling and the export's head.

    Args:
        folder: the export.
        device: "cpu" or "cuda".
        dtype: dtype of activations; parameters stay float32.
        compiled: whether to run through torch.compile.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        device: str = "cpu",
        dtype: str = "float32",
        compiled: bool = False,
    ):
        import safetensors.torch
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        self.torch = torch
        self.device = device
        self.dtype = getattr(torch, dtype)
        # On a GPU, sdpa selects its fused kernels.
        self.backbone = transformers.AutoModel.from_pretrained(
            folder, dtype=torch.float32, attn_implementation=attention(folder)
        ).to(device)
        head = safetensors.torch.load_file(next(folder.glob("*_Dense/model.safetensors")))
        self.head = torch.nn.Linear(*reversed(head["linear.weight"].shape)).to(device)
        self.head.load_state_dict(
            {name.removeprefix("linear."): value for name, value in head.items()}
        )
        self.parameters = [*self.backbone.parameters(), *self.head.parameters()]
        self.forward = torch.compile(self._forward, dynamic=True) if compiled else self._forward
        self.optimizer = None

    def _forward(self, tokens, mask):
        with self.torch.autocast(self.device, self.dtype, enabled=self.dtype != self.torch.float32):
            hidden = self.backbone(input_ids=tokens, attention_mask=mask).last_hidden_state
        hidden = hidden.float()
        pooled = (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
        return self.head(pooled)

    def tensors(self, *arrays: np.ndarray) -> list:
        """Copies integer arrays to int64 tensors on the device."""
        return [
            self.torch.from_numpy(np.ascontiguousarray(array.astype(np.int64))).to(self.device)
            for array in arrays
        ]

    def scores(self, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Returns scores [B, 2] for token ids [B, L]."""
        with self.torch.inference_mode():
            return self.forward(*self.tensors(tokens, mask)).cpu().numpy()

    def step(self, tokens: np.ndarray, mask: np.ndarray, labels: np.ndarray) -> float:
        """Makes one AdamW update, with gradients clipped to norm 1, and returns the loss."""
        torch = self.torch
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW(
                self.parameters, lr=1e-5, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, fused=True
            )
        tokens, mask, labels = self.tensors(tokens, mask, labels)
        loss = torch.nn.functional.cross_entropy(self.forward(tokens, mask), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())
