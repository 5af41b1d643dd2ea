"""The planner: memory, FLOPs and collectives of a compiled step, and rejected input."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from gemma_encoder.cli import plan as program
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.launch import flops, hlo, plan
from gemma_encoder.model import processor, sharding
from gemma_encoder.model.sizes import GEMMA_CONFIGS
from gemma_encoder.training.build import build

WIDE = {
    "num_layers": 4,
    "embed_dim": 640,
    "hidden_dim": 2048,
    "head_dim": 128,
    "query_scale": 128**-0.5,
}


@pytest.fixture(scope="module")
def wide():
    """A four-layer model that is wide enough that the TPU compiler shards its gradients."""
    return dataclasses.replace(GEMMA_CONFIGS["gemma2_tiny"], **WIDE)


@pytest.fixture(scope="module")
def run():
    """Runs the program in this process for four v5e chips with fully sharded parameters."""
    pytest.importorskip("libtpu", reason="compiling for a TPU needs libtpu: pip install 'jax[tpu]'")

    def start(*arguments, config="experiments/quickstart.py", topology="v5e:2x2", mesh="(1,-1,1)"):
        flags = [f"--config={config}", f"--topology={topology}", f"--config.mesh={mesh}"]
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return program.main([*flags, *arguments])

    return start


@pytest.fixture(scope="module")
def planned(wide, run, tmp_path_factory):
    """Exit code and figures of a plan in bfloat16."""
    file = tmp_path_factory.mktemp("plan") / "plan.json"
    fields = [
        "size=gemma2_tiny",
        f"transformer={WIDE}",
        "compute_dtype=bfloat16",
        "remat=full",
    ]
    code = run(
        *(f"--config.model.{field}" for field in fields),
        "--config.batch.rows=8",
        "--config.batch.row_length=128",
        f"--json={file}",
    )
    return code, json.loads(file.read_text())


def test_plan_has_expected_memory_and_time(planned, wide):
    code, figures = planned
    assert code == 0 and figures["fits"] and figures["chips"] == 4 and figures["mesh"] == [1, 4, 1]
    whole = 4 * wide.num_parameters
    shard = whole / 4
    # Heads and norms are replicated.
    assert shard <= figures["parameters"] <= shard + 0.01 * whole
    assert figures["optimizer"] == pytest.approx(2 * figures["parameters"], rel=0.01)
    state = figures["parameters"] + figures["optimizer"]
    assert state < figures["peak"] < figures["memory"] == 16 * 2**30
    slowest = max(figures[f"seconds_{name}"] for name in ("compute", "memory", "links"))
    assert figures["seconds"] == slowest > 0
    assert 0 < figures["utilization"] < 1


def test_state_is_donated(planned):
    """Without donation the peak would hold the state twice, old and new."""
    figures = planned[1]
    names = ("parameters", "optimizer", "other_arguments", "temporaries")
    assert figures["peak"] < sum(figures[name] for name in names) + 0.05 * figures["parameters"]


def test_stacked_parameters_are_gathered_layer_by_layer(planned, wide):
    """Parameters are gathered per layer in bfloat16, never for all layers at once."""
    gathered = [item for item in planned[1]["collectives"] if item["kind"] == "all-gather"]
    largest = 2 * wide.embed_dim * 2 * wide.hidden_dim  # gate and up projection of one layer
    assert gathered and max(item["size"] for item in gathered) <= largest
    assert {item["shape"].split("[")[0] for item in gathered if item["size"] > 1 << 18} == {"bf16"}


def test_gradient_traffic_is_near_the_ideal(planned, wide):
    """Ideally, each matrix's gradient is reduce-scattered once, in the backward pass's dtype.

    Then a chip sends (n − 1)/n of its bytes.
    """
    figures = planned[1]
    matrices = wide.num_parameters - wide.vocab_size * wide.embed_dim
    ideal = 0.75 * 2 * matrices
    kinds = ("reduce-scatter", "all-reduce")
    sent = sum(item["traffic"] for item in figures["collectives"] if item["kind"] in kinds)
    assert 0.9 * ideal < sent <= 1.2 * ideal


def test_auto_is_the_dtype_of_the_target(micro, monkeypatch):
    """Whatever is fastest on the machine that plans."""
    recipes = []

    def built(*arguments, **options):
        recipes.append(build(*arguments, **options))
        return recipes[-1]

    monkeypatch.setattr(plan, "build", built)
    monkeypatch.setattr(processor, "features", frozenset)
    config = micro(model__compute_dtype="auto")
    with pytest.raises(InputError, match="plans are available for"):
        plan.make_plan(config, "cpu:1")
    list(plan.candidates(config, 4, 1, 1e9))
    assert [recipe.encoder.compute_dtype for recipe in recipes] == ["bfloat16", "bfloat16"]


OVERSIZED = plan.Plan(
    size="x",
    topology="v5e:2x2",
    slices=0,
    mesh=(4, 1, 1),
    rows=0,
    row_length=0,
    micro_batches=0,
    remat="full",
    chips=0,
    parameters=10 * 2**30,
    optimizer=20 * 2**30,
    other_arguments=0,
    temporaries=0,
    peak=30 * 2**30,
    memory=16.0 * 2**30,
    model_flops=1.0,
    program_flops=2.0,
    collectives=[],
    seconds_compute=1.0,
    seconds_memory=0.5,
    seconds_links=2.0,
    compile_seconds=0,
)


def test_candidates_shard_a_state_that_exceeds_a_chip():
    """All of Gemma 2 2B's state is 29 GiB."""
    candidates = list(plan.candidates(recipes_config("gemma2_2b"), 4, 1, 16 * 2**30))
    assert candidates and all(np.prod(fields["mesh"][1:]) >= 2 for fields in candidates)


def test_step_that_does_not_fit_exits_1(run, capsys):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "make_plan", lambda *arguments: OVERSIZED)
        assert run() == 1
    assert "does NOT fit, 14.00 GiB too much" in capsys.readouterr().out
    assert OVERSIZED.seconds == 2.0
    assert OVERSIZED.utilization == 0.25


def recipes_config(size):
    from gemma_encoder.experiments import glue

    return glue.get_config(f"mnli,size={size}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"topology": "v9:2x2"}, "plans are available for v5e, v5p, v6e"),
        ({"topology": "v5e:3x7"}, "--topology=v5e:3x7"),
        ({"mesh": "(3,1,1)"}, "does not fit 4 devices"),
        ({"config": "experiments/nothing.py"}, "nothing.py"),
    ],
)
def test_bad_input_exits_2_with_one_line(run, arguments, message, capsys):
    assert run(**arguments) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(error) == 1 and message in error[0]


def test_scan_has_the_flops_of_its_unrolled_layers():
    """Includes the backward pass and recomputation."""
    weights = jnp.ones((5, 8, 8))

    def layer(x, w):
        return jnp.tanh(x @ w), None

    def scanned(x, weights):
        return jax.lax.scan(jax.checkpoint(layer), x, weights)[0].sum()

    def unrolled(x, weights):
        for w in weights:
            x, _ = jax.checkpoint(layer)(x, w)
        return x.sum()

    scanned_flops = gradient_flops(scanned, jnp.ones((4, 8)), weights)
    # Forward, forward again, and two products backward.
    expected = 5 * 4 * (2 * 4 * 8 * 8)
    assert scanned_flops == gradient_flops(unrolled, jnp.ones((4, 8)), weights) == expected


def gradient_flops(function, *arguments):
    return flops.count(jax.make_jaxpr(jax.grad(function, (0, 1)))(*arguments).jaxpr, 1)


def test_shard_map_flops_are_multiplied_by_chips():
    mesh = sharding.make_mesh((4, 1, 1), jax.devices()[:4])
    product = jax.shard_map(
        lambda x, w: x @ w, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data")
    )
    jaxpr = jax.make_jaxpr(product)(jnp.ones((8, 16)), jnp.ones((16, 32))).jaxpr
    assert flops.count(jaxpr, 4) == 2 * 8 * 16 * 32


HLO = """\
%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %all-gather.1 = bf16[4,640]{1,0:T(8,128)(2,1)} all-gather(%x), channel_id=3, \
replica_groups=mesh['a'=4,'b'=2] {'a'}, dimensions={0}
  %f = bf16[4,640]{1,0} fusion(%y), kind=kCustom, calls=%async_collective_fusion.1
  %s = bf16[160]{0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.7
}

%async_collective_fusion.1 (q: bf16[1,640]) -> bf16[4,640] {
  %all-gather.2 = bf16[4,640]{1,0} all-gather(%q), channel_id=3, \
replica_groups=mesh['a'=4,'b'=2] {'a'}, dimensions={0}
}

%all-reduce-scatter.7 (r: bf16[640]) -> bf16[160] {
  %all-reduce.9 = bf16[640]{0} all-reduce(%r), channel_id=1, \
replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
}

%condition (p: (s32[], f32[8])) -> pred[] {
  %constant.5 = s32[]{:T(128)} constant(13)
  ROOT %lt = pred[] compare(%i, %constant.5), direction=LT
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %while.1 = (s32[], f32[8]) while(%t), condition=%condition, body=%body
  %ar = f32[100]{0} all-reduce-start(%g), channel_id=8, replica_groups=[1,8]<=[8], to_apply=%add
  %done = f32[100]{0} all-reduce-done(%ar)
}
"""


def test_collectives_have_the_trip_counts_of_their_loops():
    collectives = hlo.collectives(HLO, 8)
    assert len(collectives) == 3
    (gather,) = [item for item in collectives if item.kind == "all-gather"]
    scatter, reduce = sorted(
        (item for item in collectives if item.kind != "all-gather"), key=lambda item: -item.times
    )
    assert gather == hlo.Collective("all-gather", "bf16[4,640]", 2 * 4 * 640, 4, 13)
    assert gather.traffic == 13 * 0.75 * 5120
    assert scatter == hlo.Collective("reduce-scatter", "bf16[640]", 320, 4, 13)
    assert scatter.traffic == 13 * 3 * 320
    assert reduce == hlo.Collective("all-reduce", "f32[100]", 400, 8, 1)
    assert reduce.traffic == 2 * 7 / 8 * 400


class FakeDevice:
    """A device of one of several slices, with the attributes that mesh construction reads."""

    platform = "cpu"
    device_kind = "cpu"

    def __init__(self, index, slice_index):
        self.id = index
        self.slice_index = slice_index
        self.process_index = slice_index


def test_each_slice_holds_a_part_of_the_data_axis(monkeypatch):
    monkeypatch.setattr(sharding, "Mesh", lambda grid, axes, axis_types: grid)
    devices = [FakeDevice(index, index // 4) for index in range(8)]
    grid = sharding.make_mesh((4, 2, 1), devices)
    assert [{device.slice_index for device in row.flat} for row in grid] == [{0}, {0}, {1}, {1}]
    with pytest.raises(InputError, match="the data axis must be a multiple of the 2 slices"):
        sharding.make_mesh((1, 8, 1), devices)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "topology", "rows"),
    [("gemma2_2b", "v5e:4x4", 32), ("gemma2_9b", "v5e:8x8", 64), ("gemma2_27b", "v5p:4x4x4", 128)],
)
def test_real_sizes_fit(run, size, topology, rows):
    """Uses the batches of launch/PLANS.md."""
    fields = [
        f"--config.batch.rows={rows}",
        "--config.batch.row_length=512",
        "--config.max_length=512",
    ]
    assert run(*fields, config=f"experiments/msmarco.py:size={size}", topology=topology) == 0
