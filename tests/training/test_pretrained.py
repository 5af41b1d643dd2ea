"""Training from pretrained weights: all formats, matching models, and export."""

import pathlib

import jax
import numpy as np
import pytest
from flax import nnx

import gemma_encoder as ge
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.model import sharding
from gemma_encoder.model.config import EncoderConfig, PoolingConfig
from gemma_encoder.model.encoder import parameter_dict
from gemma_encoder.model.transformer import Transformer
from gemma_encoder.training import loop
from gemma_encoder.training.build import build
from gemma_encoder.training.optimizer import make_optimizer
from gemma_encoder.training.optimizer_config import OptimizerConfig
from gemma_encoder.training.state import abstract_state, initial_state
from gemma_encoder.weights import backbone as backbone_module
from gemma_encoder.weights.backbone import load_pretrained, open_checkpoint

GOLDENS = pathlib.Path(__file__).parent.parent / "weights" / "huggingface"


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, micro):
    """(folder, backbone): a checkpoint of the `micro` model in the gemma package's format."""
    backbone = Transformer(build(micro(), dry=True).encoder.transformer, rngs=nnx.Rngs(5))
    folder = tmp_path_factory.mktemp("gemma") / "micro"
    ge.save_gemma(backbone, folder)
    return folder, backbone


def assert_same_backbone(actual, expected) -> None:
    jax.tree.map(
        np.testing.assert_array_equal,
        *(jax.device_get(parameter_dict(nnx.state(backbone))) for backbone in (actual, expected)),
    )


def test_pretrained_weights_survive_training_and_export(micro, pretrained, tmp_path):
    """At learning rate 0 the backbone is unchanged by training, our checkpoint and the export."""
    folder, backbone = pretrained
    config = micro(
        model__pretrained=str(folder),
        train_for="1 steps",
        optimizer__learning_rate=0.0,
        optimizer__weight_decay=0.0,
        tasks=("toy_sentiment",),
    )
    loop.train(config, tmp_path / "run")
    again = ge.load_backbone(tmp_path / "run")
    assert_same_backbone(again, backbone)
    assert_same_backbone(
        ge.load_backbone(tmp_path / "run", mesh=sharding.make_mesh((2, 2, 2))), backbone
    )
    assert ge.load_tokenizer(tmp_path / "run").name == "small"
    folder = ge.export_huggingface(ge.Predictor.load(tmp_path / "run"), tmp_path / "exported")
    assert_same_backbone(ge.load_backbone(folder), backbone)
    # The same field also accepts the first run's fine-tuned weights, and the export.
    for start in (tmp_path / "run", folder):
        recipe = build(micro(model__pretrained=str(start), model__size="pretrained"))
        assert recipe.encoder.transformer == backbone.config


def test_other_parameters_are_random_as_without_pretrained(micro, pretrained):
    folder, backbone = pretrained
    recipe = build(micro())
    mesh = sharding.make_mesh((2, 2, 2))
    optimizer = make_optimizer(recipe.optimizer, lambda step: 1.0, recipe.encoder)
    random = initial_state(recipe.encoder, optimizer, mesh, 7)
    abstract = abstract_state(recipe.encoder, optimizer, mesh)
    loaded = load_pretrained(open_checkpoint(folder), recipe.encoder, abstract.parameters)
    state = initial_state(recipe.encoder, optimizer, mesh, 7, loaded)
    jax.tree.map(
        np.testing.assert_array_equal, state.parameters["heads"], random.parameters["heads"]
    )
    jax.tree.map(
        np.testing.assert_array_equal,
        state.parameters["backbone"],
        parameter_dict(nnx.state(backbone)),
    )
    shardings = [jax.tree.map(lambda leaf: leaf.sharding, tree) for tree in (state, abstract)]
    assert shardings[0] == shardings[1]


def test_the_projection_of_a_folder_is_loaded_if_it_fits():
    folder = GOLDENS / "embedding_gemma"
    transformer = ge.load_backbone(folder).config
    for widths, fits in (((32, 16), True), ((8,), False)):
        encoder = EncoderConfig(transformer, {"a": 1}, PoolingConfig(projection=widths))
        mesh = sharding.make_mesh((1, 1, 1), jax.devices()[:1])
        optimizer = make_optimizer(OptimizerConfig(1.0), lambda step: 1.0, encoder)
        shapes = abstract_state(encoder, optimizer, mesh).parameters
        loaded = load_pretrained(open_checkpoint(folder), encoder, shapes)
        assert ("pooler" in loaded) == fits


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model__size": "tiny", "model__transformer": {}},
            r"is not tiny: num_layers is 2, expected 4; embed_dim is 32, expected 128; "
            r".* choose model.size=pretrained",
        ),
        (
            {"model__transformer": {"num_layers": 2}},
            r"is not gemma2_tiny: embed_dim is 32, expected 128; .* choose model.size=pretrained",
        ),
        (
            {"model__size": "pretrained", "model__transformer": {"num_layers": 3}},
            r"is not the model that model.transformer describes: num_layers is 2, expected 3; "
            r"choose .* another",
        ),
        (
            {"model__size": "pretrained", "model__pretrained": ""},
            "model.size=pretrained needs model.pretrained",
        ),
        ({"model__pretrained": "/nowhere/at/all"}, "/nowhere/at/all does not exist"),
    ],
)
def test_weights_of_another_model_are_refused(micro, pretrained, changes, message):
    with pytest.raises(InputError, match=message):
        build(micro(**({"model__pretrained": str(pretrained[0])} | changes)))


def test_a_tokenizer_larger_than_the_embedding_is_refused(micro):
    config = micro(
        model__size="pretrained",
        model__transformer={},
        model__pretrained=str(GOLDENS / "gemma2"),
    )
    with pytest.raises(
        InputError, match="'small' has 8000 pieces, more than the model's 48 embeddings"
    ):
        build(config)


def test_auto_is_the_tokenizer_of_the_weights(micro):
    recipe = build(
        micro(
            model__size="pretrained",
            model__transformer={},
            model__pretrained=str(GOLDENS / "embedding_gemma"),
            tokenizer="auto",
        )
    )
    assert recipe.tokenizer.vocab_size == 441
    assert recipe.encoder.transformer.bidirectional_reach == (3, 3)


@pytest.mark.parametrize("field", ["pretrained", "warm_start"])
def test_a_start_opens_its_checkpoint_once(micro, tmp_path, monkeypatch, field):
    """The config, the tokenizer and the weights share an opened checkpoint."""
    first = micro(tasks=("toy_sentiment",), train_for="1 steps", max_eval_examples=4)
    loop.train(first, tmp_path / "first")
    opened = []
    init = backbone_module.native.NativeCheckpoint.__init__

    def count(self, path):
        opened.append(path)
        init(self, path)

    monkeypatch.setattr(backbone_module.native.NativeCheckpoint, "__init__", count)
    config = micro(
        **{f"model__{field}": str(tmp_path / "first")},
        tasks=("toy_sentiment",),
        train_for="1 steps",
        max_eval_examples=4,
        tokenizer="auto",
    )
    loop.train(config, tmp_path / "second")
    assert len(opened) == 1


def test_the_reach_of_pretrained_weights_may_be_set(micro, pretrained):
    """The reach changes no parameter, so the checkpoint still matches."""
    recipe = build(
        micro(
            model__size="pretrained",
            model__pretrained=str(pretrained[0]),
            model__transformer={"bidirectional_reach": (2, 2)},
        )
    )
    assert recipe.encoder.transformer.bidirectional_reach == (2, 2)
    assert recipe.encoder.transformer.embed_dim == 32
