"""The same random encoder in both hands: ours, and Hugging Face transformers' on the export that ours writes.

Imported inside arms: each framework is loaded only where it works. B rows, L tokens.
"""

import json
import multiprocessing
import pathlib
import shutil
from typing import Any

import numpy as np

TASK = "glue_sst2"


def write(
    folder: pathlib.Path, size: str, max_length: int, task: str = TASK, pooling: str = "mean"
) -> None:
    """A random encoder of a published size with one head, by default of two classes on mean pooling, as an export; in a process of its own."""
    process = multiprocessing.get_context("spawn").Process(
        target=_write, args=(folder, size, max_length, task, pooling)
    )
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError("the model could not be written")


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
    spec = InferenceSpec(
        config,
        (task,),
        ge.Tokenizer.load("small"),
        max_length,
        -(-max_length // 128) * 128,
        "right",
        0,
    )
    ge.export_huggingface(ge.Predictor(spec, initial_parameters(config, jax.random.key(0))), folder)


def as_sequence_classifier(export: pathlib.Path, folder: pathlib.Path, labels: int) -> None:
    """An export whose head is linear on the last token, as transformers' `Gemma…ForSequenceClassification`, which CrossEncoder and Trainer take.

    Its `score` has no bias, so the head's must be zero, as it is in a fresh head.
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
    names = {
        "id2label": {str(label): str(label) for label in range(labels)},
        "label2id": {str(label): label for label in range(labels)},
    }
    (folder / "config.json").write_text(
        json.dumps(config | names | {"architectures": [architecture]})
    )
    head = safetensors.numpy.load_file(next(export.glob("*_Dense/model.safetensors")))
    if head["linear.weight"].shape[0] != labels or head["linear.bias"].any():
        raise ValueError(
            f"the head must be linear to {labels} without a bias, got {head['linear.weight'].shape}"
        )
    tensors = {"score.weight": head["linear.weight"]}
    for file in export.glob("model*.safetensors"):
        tensors |= {
            f"model.{name}": value for name, value in safetensors.numpy.load_file(file).items()
        }
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def attention(folder: pathlib.Path) -> str:
    """The best of transformers' attention implementations that needs nothing but PyTorch: sdpa, or eager where there is a soft cap, which sdpa lacks."""
    return (
        "eager"
        if json.loads((folder / "config.json").read_text()).get("attn_logit_softcapping")
        else "sdpa"
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
    """Our training program and its state, from the export's weights: AdamW at a constant rate, no dropout, one device."""
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
    config.batch.rows, config.batch.row_length, config.batch.segments = rows, row_length, segments
    config.batch.examples_per_step, config.max_length = examples_per_step, row_length
    config.model.feed_forward_dropout, config.model.compute_dtype, config.model.remat = (
        0.0,
        dtype,
        remat,
    )
    config.optimizer.learning_rate, config.optimizer.schedule = 1e-5, "constant"
    built = build(config, dry=True)
    encoder = spec.encoder.__class__.from_dict(
        {
            **spec.encoder.to_dict(),
            "compute_dtype": dtype,
            "remat": remat,
            "feed_forward_dropout": 0.0,
        }
    )
    built = built.__class__(**{**vars(built), "encoder": encoder})
    program = make_program(built, mesh, total=1_000_000, warmup=0)
    return program, initial_state(
        encoder, program.optimizer, mesh, 0, parameters, program.is_trainable
    )


class TorchEncoder:
    """The peer: transformers' model under mean pooling and the export's head.

    Args:
        folder: the export.
        device: "cpu" or "cuda".
        dtype: of the activations; parameters stay float32.
        compiled: run through torch.compile.
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
        self.torch, self.device, self.dtype = torch, device, getattr(torch, dtype)
        # On a GPU sdpa picks its fused kernels.
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
        """The arrays on the device."""
        return [
            self.torch.from_numpy(np.ascontiguousarray(array)).to(self.device) for array in arrays
        ]

    def scores(self, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """[B, 2] of token ids [B, L]."""
        with self.torch.inference_mode():
            return (
                self.forward(*self.tensors(tokens.astype(np.int64), mask.astype(np.int64)))
                .cpu()
                .numpy()
            )

    def step(self, tokens: np.ndarray, mask: np.ndarray, labels: np.ndarray) -> float:
        """One update by AdamW, gradients clipped to norm 1; gives the loss."""
        torch = self.torch
        if self.optimizer is None:
            decayed = [p for p in self.parameters]
            self.optimizer = torch.optim.AdamW(
                decayed, lr=1e-5, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, fused=True
            )
        tokens, mask, labels = self.tensors(
            tokens.astype(np.int64), mask.astype(np.int64), labels.astype(np.int64)
        )
        loss = torch.nn.functional.cross_entropy(self.forward(tokens, mask), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())
