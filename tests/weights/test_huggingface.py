"""Reading Hugging Face folders: hidden states equal those of transformers (goldens.py)."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from gemma_encoder.inference import Predictor
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.model.config import PoolingConfig
from gemma_encoder.model.sharding import make_mesh
from gemma_encoder.model.sizes import GEMMA_CONFIGS
from gemma_encoder.weights import backbone as weights
from gemma_encoder.weights import huggingface, tensors
from gemma_encoder.weights.safetensors_reader import read_header
from tests.weights.goldens import CASES, GOLDENS

# Both sides compute in float32, with sums in another order; hidden states have size 4 after at most
# eight layers. Likely errors (a window off by one, a rotary base, the kind of GELU, epsilon) change
# them by 8e-4 or more.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module", params=CASES)
def case(request):
    """Returns (folder, golden arrays, our backbone, attention)."""
    folder = GOLDENS / request.param
    backbone = weights.load_backbone(folder)
    attention = "bidirectional" if backbone.config.bidirectional_reach else "causal"
    return folder, np.load(folder / "golden.npz"), backbone, attention


def test_hidden_states_equal_those_of_transformers(case):
    _, golden, backbone, attention = case
    assert golden["tokens"].shape[1] > 2 * backbone.config.sliding_window
    np.testing.assert_allclose(
        backbone(golden["tokens"], attention=attention), golden["hidden"], **TOLERANCE
    )


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_hidden_states_equal_those_of_transformers(case, side):
    _, golden, backbone, attention = case
    mask = golden[f"{side}_mask"].astype(np.int32)
    positions = np.maximum(mask.cumsum(axis=1) - 1, 0).astype(np.int32)
    hidden = backbone(golden[f"{side}_tokens"], mask, positions, attention=attention)
    np.testing.assert_allclose(
        np.asarray(hidden)[mask > 0], golden[f"{side}_hidden"][mask > 0], **TOLERANCE
    )


def test_the_reach_equals_that_measured_in_transformers(case):
    _, golden, backbone, attention = case
    assert backbone.config.reach("local", attention) == tuple(golden["reach"])


def test_folders_are_loaded_onto_a_mesh(case):
    folder, _, backbone, _ = case
    spread = weights.load_backbone(folder, mesh=make_mesh((2, 2, 2)))
    actual, expected = (
        jax.device_get(jax.tree.leaves(nnx.state(model))) for model in (spread, backbone)
    )
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_large_parameters_are_converted_on_devices(case, monkeypatch):
    """Programs on the devices and numpy on the host give the same values and shardings."""
    folder, _, _, _ = case
    mesh = make_mesh((2, 2, 2))
    loaded = []
    for largest in (1 << 24, 0):
        monkeypatch.setattr(tensors, "MAX_ON_HOST", largest)
        backbone = weights.load_backbone(folder, mesh=mesh, dtype=jnp.bfloat16)
        loaded.append(jax.tree.leaves(nnx.state(backbone)))
    for on_host, on_devices in zip(*loaded, strict=True):
        assert on_host.sharding.is_equivalent_to(on_devices.sharding, on_host.ndim)
        np.testing.assert_array_equal(np.asarray(on_host), np.asarray(on_devices))


def test_embedding_gemma_embeds_as_sentence_transformers_does():
    """Covers tokenizer, transformer, mean pooling, both dense layers and normalization."""
    predictor = Predictor.load(GOLDENS / "embedding_gemma")
    golden = np.load(GOLDENS / "embedding_gemma" / "golden.npz")
    assert predictor.spec.encoder.pooling == PoolingConfig(
        "mean", projection=(32, 16), normalize=True
    )
    np.testing.assert_allclose(
        predictor.embed(list(golden["texts"])), golden["embedding"], **TOLERANCE
    )
    with pytest.raises(InputError, match="the checkpoint has no task"):
        predictor.predict(["text"])


def test_vision_and_decoder_weights_are_skipped_and_named():
    skipped = {case: weights.open_checkpoint(GOLDENS / case).skipped for case in CASES}
    assert {name.split(".")[0] for name in skipped["gemma3_vision"]} == {
        "vision_tower",
        "multi_modal_projector",
    }
    assert {name.rpartition("decoder.")[0] for name in skipped["t5gemma"]} == {"model."}
    assert not skipped["gemma2"]


# Config files of older versions of transformers, as in published checkpoints.
OLD_GEMMA3 = {
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
}
OLD_GEMMA2 = {
    "model_type": "gemma2",
    "attn_logit_softcapping": 50.0,
    "head_dim": 128,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 4608,
    "intermediate_size": 36864,
    "num_attention_heads": 32,
    "num_hidden_layers": 46,
    "num_key_value_heads": 16,
    "query_pre_attn_scalar": 144,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "vocab_size": 256000,
}


@pytest.mark.parametrize(
    ("values", "size", "vocab"),
    [(OLD_GEMMA3, "gemma3_4b", 262208), (OLD_GEMMA2, "gemma2_27b", 256000)],
)
def test_config_files_of_older_versions_are_read(values, size, vocab):
    config = huggingface.transformer_config(values, "config.json")
    assert weights.transformer_differences(config, GEMMA_CONFIGS[size]) == []
    assert (weights.size_name(config), config.vocab_size) == (size, vocab)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "gemma"},
            "unknown model_type in config.json: 'gemma'; did you mean 'gemma.'",
        ),
        (
            {"hidden_activation": "gelu"},
            "hidden_activation is 'gelu', expected Gemma's 'gelu_pytorch_tanh'",
        ),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps is 1e-05"),
        ({"attention_bias": True}, "attention_bias is True"),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
            "rope_type is 'yarn', expected Gemma's 'default' or 'linear'",
        ),
        (
            {"layer_types": ["chunked_attention"]},
            "'chunked_attention' is missing or has an unknown value",
        ),
        ({"hidden_size": None}, "the field 'hidden_size' is missing"),
    ],
)
def test_models_that_are_not_gemma_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        huggingface.transformer_config(OLD_GEMMA2 | changes, "config.json")


@pytest.fixture
def copy(tmp_path):
    """Returns a copy of gemma2's golden folder, of two files, that a test may damage."""
    return shutil.copytree(GOLDENS / "gemma2", tmp_path / "copy")


def test_damaged_folders_are_refused(copy, tmp_path):
    part = copy / "model-00002-of-00002.safetensors"
    content = part.read_bytes()
    part.write_bytes(content[:-10])
    with pytest.raises(
        InputError, match=r"model-00002-of-00002.safetensors is truncated: .* download it again"
    ):
        weights.load_backbone(copy)
    part.write_bytes(b"<html>no such file</html>")
    with pytest.raises(InputError, match="is not a safetensors file, or it is damaged"):
        weights.load_backbone(copy)
    part.unlink()
    with pytest.raises(
        InputError, match="names model-00002-of-00002.safetensors, which is missing"
    ):
        weights.load_backbone(copy)
    (copy / "model.safetensors.index.json").unlink()
    with pytest.raises(
        InputError,
        match=r"has neither model.safetensors nor model.safetensors.index.json; other formats",
    ):
        weights.load_backbone(copy)
    (copy / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config.json cannot be read \(Expecting.*; copy, "):
        weights.load_backbone(copy)


def test_every_mismatched_tensor_is_listed(copy):
    part = copy / "model-00002-of-00002.safetensors"
    tensors = safetensors.numpy.load_file(part)
    first, second, *_ = sorted(tensors)
    tensors[second] = np.zeros((3, 3), np.float32)
    tensors["model.layers.0.lora"] = np.zeros(1, np.float32)
    del tensors[first]
    (copy / "model-00001-of-00002.safetensors").rename(copy / "model.safetensors")
    tensors |= safetensors.numpy.load_file(copy / "model.safetensors")
    (copy / "model.safetensors.index.json").unlink()
    safetensors.numpy.save_file(tensors, copy / "model.safetensors")
    with pytest.raises(InputError) as error:
        weights.load_backbone(copy)
    for problem in (
        f"{first} is missing",
        "model.layers.0.lora is unexpected",
        f"{second} has shape (3, 3), expected",
    ):
        assert problem in str(error.value)


def test_quantized_tensors_are_refused(copy):
    (copy / "model.safetensors.index.json").unlink()
    safetensors.numpy.save_file(
        {"model.embed_tokens.weight": np.zeros((4, 4), np.int8)}, copy / "model.safetensors"
    )
    with pytest.raises(
        InputError,
        match="unsupported dtype of model.embed_tokens.weight; expected float32, float16 or "
        "bfloat16, use weights that are not quantized",
    ):
        weights.load_backbone(copy)


def test_a_transformer_without_pooler_is_refused():
    with pytest.raises(
        InputError,
        match="is a transformer without pooler or head; fine-tune it first, or use load_backbone",
    ):
        Predictor.load(GOLDENS / "gemma3_text")


def test_the_tokenizer_is_loaded_and_checked(tmp_path, caplog):
    folder = GOLDENS / "embedding_gemma"
    with caplog.at_level("INFO", logger="absl"):
        tokenizer = weights.load_tokenizer(folder)
    assert tokenizer.vocab_size == 441
    assert "has 441 pieces; 7 embeddings of the model are unused" in caplog.text
    shutil.copytree(GOLDENS / "gemma2", tmp_path / "small")
    shutil.copy(folder / "tokenizer.model", tmp_path / "small")
    with pytest.raises(InputError, match="has 441 pieces, more than the model's 48 embeddings"):
        weights.load_tokenizer(tmp_path / "small")
    assert weights.family(GEMMA_CONFIGS["gemma2_9b"]) == "gemma2"
    assert weights.family(GEMMA_CONFIGS["gemma3_270m"]) == "gemma3"


def write_safetensors(path, header, data=b""):
    """Writes a file of the format with any header, an object or bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(first, last, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [first, last]}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": entry(0, 4), "b": entry(0, 4)}, "b overlaps another tensor"),
        ({"a": entry(0, 4), "b": entry(2, 6), "c": entry(6, 8)}, "b overlaps another tensor"),
        ({"a": entry(4, 8)}, "a leaves a gap before it"),
        ({"a": entry(0, 4)}, "4 bytes belong to no tensor"),
        ({"a": entry(0, 4), "b": entry(4, 12)}, "is truncated: b ends at byte 12, the data at 8"),
        ({"a": entry(-4, 0), "b": entry(0, 8)}, "a tensor's bytes are -4 to 0"),
        ({"a": entry(8, 4)}, "a tensor's bytes are 8 to 4"),
        ({"a": entry(0, 8, (-1, -2))}, "a has no valid shape"),
        ({"a": entry(0, 8, (10**30, 0))}, "a has no valid shape"),
        ({"a": entry(0, 8, (True, 2))}, "a has no valid shape"),
        ({"a": entry(0, 8, (1,) * 60)}, "a has no valid shape"),
        ({"a": entry(0, 8, (10**12,))}, "a has 8 bytes, expected 4000000000000"),
        ({"a": entry(0, 8, (2,), ["F32"])}, "is not a safetensors file, or it is damaged"),
        ({"a": [0, 8]}, "is not a safetensors file, or it is damaged"),
        (b"[]", "is not a safetensors file, or it is damaged"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' + b"1" * 5_000 + b"}", "is not a safetensors file, or it is damaged"),
        (b'{"\xff": 1}', "is not a safetensors file, or it is damaged"),
    ],
)
def test_malformed_headers_are_refused(tmp_path, header, message):
    path = write_safetensors(tmp_path / "model.safetensors", header, bytes(8))
    with pytest.raises(InputError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("length", [0, 9, 1 << 20, 1 << 30, (1 << 64) - 1])
def test_the_header_is_no_longer_than_the_file(tmp_path, length):
    path = tmp_path / "model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b"{}")
    with pytest.raises(InputError, match=f"its header has {length} bytes; copy or download"):
        read_header(path)


def test_empty_tensors_and_metadata_are_read(tmp_path):
    header = {"__metadata__": {"format": "pt"}, "b": entry(0, 8, (2,)), "a": entry(8, 8, (0, 3))}
    slots = read_header(write_safetensors(tmp_path / "model.safetensors", header, bytes(8)))
    assert {name: slot.tensor.shape for name, slot in slots.items()} == {"a": (0, 3), "b": (2,)}
