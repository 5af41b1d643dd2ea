"""Training that starts from somebody's weights: every format, the right model, and the way back."""

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
    """(folder, backbone) of a checkpoint in the gemma package's format, of the `micro` model."""
    backbone = Transformer(build(micro(), dry=True).encoder.transformer, rngs=nnx.Rngs(5))
    folder = tmp_path_factory.mktemp("gemma") / "micro"
    ge.save_gemma(backbone, folder)
    return folder, backbone


def assert_same_backbone(found, expected) -> None:
    jax.tree.map(
        np.testing.assert_array_equal,
        *(jax.device_get(parameter_dict(nnx.state(backbone))) for backbone in (found, expected)),
    )


def test_a_run_starts_from_pretrained_weights_and_its_checkpoint_is_read_back(
    micro, pretrained, tmp_path
):
    """With a learning rate of zero the backbone stays what it was, through our own checkpoint and out again."""
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
    # A second run starts from the first one's fine-tuned weights, or from the export, by the same field.
    for start in (tmp_path / "run", folder):
        recipe = build(micro(model__pretrained=str(start), model__size="pretrained"))
        assert recipe.encoder.transformer == backbone.config


def test_what_is_not_pretrained_is_drawn_as_ever(micro, pretrained):
    folder, backbone = pretrained
    recipe, mesh = build(micro()), sharding.make_mesh((2, 2, 2))
    optimizer = make_optimizer(recipe.optimizer, lambda step: 1.0, recipe.encoder)
    random = initial_state(recipe.encoder, optimizer, mesh, 7)
    abstract = abstract_state(recipe.encoder, optimizer, mesh)
    state = initial_state(
        recipe.encoder,
        optimizer,
        mesh,
        7,
        load_pretrained(open_checkpoint(folder), recipe.encoder, abstract.parameters),
    )
    jax.tree.map(
        np.testing.assert_array_equal, state.parameters["heads"], random.parameters["heads"]
    )
    jax.tree.map(
        np.testing.assert_array_equal,
        state.parameters["backbone"],
        parameter_dict(nnx.state(backbone)),
    )
    places = [jax.tree.map(lambda leaf: leaf.sharding, tree) for tree in (state, abstract)]
    assert places[0] == places[1]


def test_the_projection_of_a_folder_comes_along_where_it_fits():
    folder = GOLDENS / "embedding_gemma"
    transformer = ge.load_backbone(folder).config
    for widths, loaded in (((32, 16), True), ((8,), False)):
        encoder = EncoderConfig(transformer, {"a": 1}, PoolingConfig(projection=widths))
        mesh = sharding.make_mesh((1, 1, 1), jax.devices()[:1])
        found = load_pretrained(
            open_checkpoint(folder),
            encoder,
            abstract_state(
                encoder,
                make_optimizer(OptimizerConfig(1.0), lambda step: 1.0, encoder),
                mesh,
            ).parameters,
        )
        assert ("pooler" in found) == loaded


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model__size": "tiny", "model__transformer": {}},
            r"is not tiny: num_layers is 2, expected 4; embed_dim is 32, expected 128; .* choose model.size=pretrained",
        ),
        (
            {"model__transformer": {"num_layers": 2}},
            r"is not gemma2_tiny: embed_dim is 32, expected 128; .* choose model.size=pretrained",
        ),
        (
            {"model__size": "pretrained", "model__transformer": {"num_layers": 3}},
            r"is not what model.transformer says: num_layers is 2, expected 3; choose .* another",
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


def test_a_tokenizer_with_more_pieces_than_embeddings_is_refused(micro):
    config = micro(
        model__size="pretrained",
        model__transformer={},
        model__pretrained=str(GOLDENS / "gemma2"),
    )
    with pytest.raises(
        InputError, match="'small' has 8000 pieces, more than the model's 48 embeddings"
    ):
        build(config)


def test_the_tokenizer_that_lies_with_the_weights_is_the_default(micro):
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
    """The model, the tokenizer and the weights come from one opened checkpoint."""
    first = micro(tasks=("toy_sentiment",), train_for="1 steps", max_eval_examples=4)
    loop.train(first, tmp_path / "first")
    opened, real = [], backbone_module.native.NativeCheckpoint.__init__

    def count(self, path):
        opened.append(path)
        real(self, path)

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
    """It changes no parameter, so it is no other model."""
    recipe = build(
        micro(
            model__size="pretrained",
            model__pretrained=str(pretrained[0]),
            model__transformer={"bidirectional_reach": (2, 2)},
        )
    )
    assert recipe.encoder.transformer.bidirectional_reach == (2, 2)
    assert recipe.encoder.transformer.embed_dim == 32
