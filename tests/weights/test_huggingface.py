"""Hugging Face folders, against hidden states that transformers computed (huggingface/*/golden.npz; see make_huggingface_goldens.py)."""

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from gemma_encoder.inference import Predictor, export_huggingface
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.task import Task
from gemma_encoder.inputs.template import Template
from gemma_encoder.inputs.tokenizer import Tokenizer
from gemma_encoder.model.config import EncoderConfig, HeadConfig, PoolingConfig
from gemma_encoder.model.encoder import abstract_encoder, parameter_dict, parameter_paths
from gemma_encoder.model.sharding import make_mesh
from gemma_encoder.model.sizes import GEMMA_CONFIGS
from gemma_encoder.weights import backbone as weights
from gemma_encoder.weights import export, huggingface
from gemma_encoder.weights.native import InferenceSpec

GOLDENS = pathlib.Path(__file__).parent / "huggingface"
CASES = (
    "gemma2",
    "gemma2_bidirectional",
    "gemma3_text",
    "gemma3_bidirectional",
    "gemma3_vision",
    "t5gemma",
)
# Float32 on both sides, sums in another order, hidden states of size 4 after at most eight layers. What could be wrong (a window
# off by one, a rotary base, the kind of GELU, epsilon) moves them by 8e-4 or more.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module", params=CASES)
def case(request):
    """(folder, golden arrays, our backbone, the setting of the mask switch)."""
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


def test_the_reach_is_the_one_that_was_measured_in_transformers(case):
    _, golden, backbone, attention = case
    assert backbone.config.reach("local", attention) == tuple(golden["reach"])


def test_folders_are_read_onto_a_mesh(case):
    folder, _, backbone, _ = case
    spread = weights.load_backbone(folder, mesh=make_mesh((2, 2, 2)))
    jax.tree.map(
        np.testing.assert_array_equal,
        *(jax.device_get(jax.tree.leaves(nnx.state(model))) for model in (spread, backbone)),
    )


def test_embedding_gemma_embeds_as_sentence_transformers_does():
    """Tokenizer, transformer, mean, both dense layers and the scaling to length 1."""
    predictor = Predictor.load(GOLDENS / "embedding_gemma")
    golden = np.load(GOLDENS / "embedding_gemma" / "golden.npz")
    assert predictor.spec.encoder.pooling == PoolingConfig(
        "mean", projection=(32, 16), normalize=True
    )
    np.testing.assert_allclose(
        predictor.embed(list(golden["texts"])), golden["embedding"], **TOLERANCE
    )
    with pytest.raises(InputError, match="the checkpoint knows no task"):
        predictor.predict(["text"])


def test_vision_and_decoder_weights_are_skipped_and_named():
    skipped = {case: weights.open_checkpoint(GOLDENS / case).skipped for case in CASES}
    assert {name.split(".")[0] for name in skipped["gemma3_vision"]} == {
        "vision_tower",
        "multi_modal_projector",
    }
    assert {name.rpartition("decoder.")[0] for name in skipped["t5gemma"]} == {"model."}
    assert not skipped["gemma2"]


# What older versions of transformers wrote, and published files hold.
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
def test_config_files_of_older_versions_are_understood(values, size, vocab):
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
            "hidden_activation is 'gelu', Gemma's is 'gelu_pytorch_tanh'",
        ),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps is 1e-05"),
        ({"attention_bias": True}, "attention_bias is True"),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
            "rotary positions of type 'yarn' are not Gemma's",
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
    """A copy of gemma2's golden folder, in two files, to be damaged."""
    return shutil.copytree(GOLDENS / "gemma2", tmp_path / "copy")


def test_damaged_folders_are_refused(copy, tmp_path):
    part = copy / "model-00002-of-00002.safetensors"
    content = part.read_bytes()
    part.write_bytes(content[:-10])
    with pytest.raises(
        InputError, match=r"model-00002-of-00002.safetensors is cut short: .* download it again"
    ):
        weights.load_backbone(copy)
    part.write_bytes(b"<html>no such file</html>")
    with pytest.raises(InputError, match="is no safetensors file, or it is damaged"):
        weights.load_backbone(copy)
    part.unlink()
    with pytest.raises(
        InputError, match="names model-00002-of-00002.safetensors, which is missing"
    ):
        weights.load_backbone(copy)
    (copy / "model.safetensors.index.json").unlink()
    with pytest.raises(
        InputError,
        match=r"holds no model.safetensors and no model.safetensors.index.json; other formats",
    ):
        weights.load_backbone(copy)
    (copy / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config.json cannot be read \(JSONDecodeError\)"):
        weights.load_backbone(copy)


def test_every_tensor_that_does_not_fit_is_listed(copy):
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
        "model.layers.0.lora is surplus",
        f"{second} has shape (3, 3), expected",
    ):
        assert problem in str(error.value)


def test_quantised_tensors_are_refused(copy):
    (copy / "model.safetensors.index.json").unlink()
    safetensors.numpy.save_file(
        {"model.embed_tokens.weight": np.zeros((4, 4), np.int8)}, copy / "model.safetensors"
    )
    with pytest.raises(
        InputError,
        match="only float32, float16 and bfloat16 tensors are read; quantised: model.embed_tokens.weight",
    ):
        weights.load_backbone(copy)


def make_predictor(transformer, classes=("no", "yes"), **fields) -> Predictor:
    """A predictor with random parameters and the small tokenizer."""
    tasks = (
        ()
        if classes is None
        else (
            Task("t", "classification", Template("{text}"), metrics=("accuracy",), classes=classes),
        )
    )
    config = EncoderConfig(
        transformer,
        **{
            "heads": {task.head: task.num_outputs for task in tasks},
            "compute_dtype": "float32",
            **fields,
        },
    )
    rng = np.random.default_rng(0)
    parameters = jax.tree.map(
        lambda leaf: jax.numpy.asarray(0.2 * rng.standard_normal(leaf.shape), leaf.dtype),
        abstract_encoder(config).shapes,
    )
    return Predictor(
        InferenceSpec(config, tasks, Tokenizer.load("small"), 48, 128, "right", 7), parameters
    )


TINY = {
    "num_layers": 4,
    "embed_dim": 16,
    "hidden_dim": 24,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 8,
    "query_scale": 8**-0.5,
    "sliding_window": 8,
}
TRANSFORMERS = {
    family: dataclasses.replace(GEMMA_CONFIGS[f"{family}_tiny"], **TINY)
    for family in ("gemma2", "gemma3")
}
TEXTS = ["a fine film", "a very long text that says nothing " * 4, "żółć 日本語 🎬", "x"]


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("gemma2", {}),
        ("gemma3", {"heads": {"t": HeadConfig(2, hidden_dims=(12, 6))}}),
        ("gemma3", {"attention": "causal", "pooling": PoolingConfig("last_k")}),
        ("gemma2", {"pooling": PoolingConfig("first_k", projection=(20, 8), normalize=True)}),
    ],
)
def test_exporting_and_loading_is_the_identity(tmp_path, family, fields):
    """Bits of every parameter, the tokenizer, tasks and predictions; and once more from the loaded one."""
    predictor = make_predictor(TRANSFORMERS[family], **fields)
    for place in ("once", "twice"):
        again = Predictor.load(export_huggingface(predictor, tmp_path / place))
        assert again.spec.description() == predictor.spec.description()
        assert (
            parameter_paths(again.parameters).keys() == parameter_paths(predictor.parameters).keys()
        )
        jax.tree.map(np.testing.assert_array_equal, again.parameters, predictor.parameters)
        if place == "once" and predictor.spec.encoder.heads["t"].hidden_dims:
            np.testing.assert_array_equal(again.predict(TEXTS), predictor.predict(TEXTS))
        predictor = again


def test_what_transformers_reads_says_the_same_model(tmp_path, monkeypatch):
    """Without our own file beside it: the config.json alone, and tensors in several files."""
    monkeypatch.setattr(export, "MAX_FILE", 100_000)
    for family, transformer in TRANSFORMERS.items():
        for attention in ("bidirectional", "causal"):
            predictor = make_predictor(transformer, attention=attention)
            folder = export_huggingface(predictor, tmp_path / family / attention)
            (folder / "gemma_encoder.json").unlink()
            assert len(list(folder.glob("model-*.safetensors"))) > 1
            backbone = weights.load_backbone(folder)
            for kind in ("local", "global"):
                assert backbone.config.attention_spec(
                    kind, attention
                ) == transformer.attention_spec(kind, attention)
            assert (
                weights.transformer_differences(
                    backbone.config,
                    dataclasses.replace(transformer, sliding_window=backbone.config.sliding_window),
                )
                == []
            )
            found = parameter_dict(nnx.state(backbone))
            jax.tree.map(np.testing.assert_array_equal, found, predictor.parameters["backbone"])


@pytest.mark.parametrize("case", CASES)
def test_an_export_spells_the_switch_as_transformers_does(case):
    """For every golden folder: the fields that decide what is computed are those that transformers itself wrote."""
    theirs = json.loads((GOLDENS / case / "config.json").read_text())
    theirs = theirs.get("text_config") or theirs.get("encoder") or theirs
    config = weights.open_checkpoint(GOLDENS / case).config()
    ours = export.transformer_json(
        EncoderConfig(config, attention="bidirectional" if config.bidirectional_reach else "causal")
    )
    if case == "t5gemma":  # its encoder is Gemma 2's transformer, always bidirectional
        theirs |= {"model_type": "gemma2", "is_causal": False}
    for name in (
        "model_type",
        "layer_types",
        "sliding_window",
        "query_pre_attn_scalar",
        "attn_logit_softcapping",
        "rope_parameters",
        "head_dim",
        "vocab_size",
    ):
        assert ours[name] == theirs[name], name
    for switch in ("is_causal", "use_bidirectional_attention"):
        assert bool(ours.get(switch)) == bool(theirs.get(switch)) and (switch in ours) >= (
            theirs.get(switch) is not None and switch == "is_causal"
        )


def test_several_heads_are_left_out_when_asked(tmp_path):
    predictor = make_predictor(TRANSFORMERS["gemma3"])
    folder = export_huggingface(predictor, tmp_path / "bare", heads=False)
    assert [
        module["type"].rpartition(".")[2]
        for module in json.loads((folder / "modules.json").read_text())
    ] == ["Transformer", "Pooling"]
    again = Predictor.load(folder)
    assert not again.tasks
    assert "heads" not in again.parameters
    jax.tree.map(
        np.testing.assert_array_equal,
        again.parameters["backbone"],
        predictor.parameters["backbone"],
    )


@pytest.mark.parametrize(
    ("family", "changes", "fields", "message"),
    [
        (
            "gemma3",
            {},
            {"pooling": PoolingConfig("attention_query", heads=2)},
            "no pooler like 'attention_query'; it has mean, first_k, last_k",
        ),
        (
            "gemma3",
            {},
            {"pooling": PoolingConfig("last_k", k=3)},
            "last_k pooling takes one state, not 3",
        ),
        (
            "gemma3",
            {},
            {"heads": {"a": 1, "b": 1}},
            r"room for one head, there are 2 \(a, b\); heads=False leaves them out",
        ),
        (
            "gemma3",
            {"bidirectional_reach": (3, 2)},
            {},
            "reach 3 tokens to the left and 2 to the right",
        ),
        ("gemma2", {"bidirectional_reach": (0, 0)}, {}, "sees its own token only"),
        ("gemma2", {"global_rope_scale": 8.0}, {}, "one rotary base and no scaling"),
        ("gemma2", {"num_heads": 3}, {}, "the width 16 to be a multiple of the 3 query heads"),
    ],
)
def test_what_the_format_cannot_express_is_refused(tmp_path, family, changes, fields, message):
    predictor = make_predictor(dataclasses.replace(TRANSFORMERS[family], **changes))
    predictor.spec = dataclasses.replace(
        predictor.spec, encoder=dataclasses.replace(predictor.spec.encoder, **fields)
    )
    with pytest.raises(InputError, match=f"cannot be exported: .*{message}"):
        export_huggingface(predictor, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_in_use_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="is not empty; name a new folder"):
        export_huggingface(make_predictor(TRANSFORMERS["gemma3"]), tmp_path)


def test_a_bare_transformer_is_no_predictor():
    with pytest.raises(
        InputError,
        match="holds a transformer without pooler or head; fine-tune it first, or use load_backbone",
    ):
        Predictor.load(GOLDENS / "gemma3_text")


def test_the_tokenizer_comes_along(tmp_path, caplog):
    folder = GOLDENS / "embedding_gemma"
    with caplog.at_level("INFO", logger="absl"):
        tokenizer = weights.load_tokenizer(folder)
    assert tokenizer.vocab_size == 441
    assert "has 441 pieces; the model's other 7 embeddings stay unused" in caplog.text
    shutil.copytree(GOLDENS / "gemma2", tmp_path / "small")
    shutil.copy(folder / "tokenizer.model", tmp_path / "small")
    with pytest.raises(InputError, match="has 441 pieces, more than the model's 48 embeddings"):
        weights.load_tokenizer(tmp_path / "small")
    assert weights.family(GEMMA_CONFIGS["gemma2_9b"]) == "gemma2"
    assert weights.family(GEMMA_CONFIGS["gemma3_270m"]) == "gemma3"
