"""Plans: what is counted, what is refused; and what the compiled program does between chips."""

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
from gemma_encoder.model import sharding
from gemma_encoder.model.sizes import GEMMA_CONFIGS

WIDE = {
    "num_layers": 4,
    "embed_dim": 640,
    "hidden_dim": 2048,
    "head_dim": 128,
    "query_scale": 128**-0.5,
}


@pytest.fixture(scope="module")
def wide():
    """A size that is as a real one in all but depth: four layers, wide enough that a TPU's program cuts up its gradients."""
    return dataclasses.replace(GEMMA_CONFIGS["gemma2_tiny"], **WIDE)


@pytest.fixture(scope="module")
def run():
    """Runs the program with arguments in this process, for four v5e chips with parameters cut up over all."""
    pytest.importorskip("libtpu", reason="compiling for a TPU needs libtpu: pip install 'jax[tpu]'")

    def start(*arguments, config="experiments/quickstart.py", topology="v5e:2x2", mesh="(1,-1,1)"):
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return program.main(
                [
                    f"--config={config}",
                    f"--topology={topology}",
                    f"--config.mesh={mesh}",
                    *arguments,
                ]
            )

    return start


@pytest.fixture(scope="module")
def planned(wide, run, tmp_path_factory):
    """(exit code, figures) of a plan in bfloat16."""
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


def test_a_plan_says_what_a_step_needs(planned, wide):
    code, figures = planned
    assert code == 0 and figures["fits"] and figures["chips"] == 4 and figures["mesh"] == [1, 4, 1]
    cut, whole = 4 * wide.num_parameters / 4, 4 * wide.num_parameters
    assert (
        cut <= figures["parameters"] <= cut + 0.01 * whole
    )  # heads and norms are whole everywhere
    assert figures["optimizer"] == pytest.approx(2 * figures["parameters"], rel=0.01)
    assert (
        figures["parameters"] + figures["optimizer"]
        < figures["peak"]
        < figures["memory"]
        == 16 * 2**30
    )
    assert (
        figures["seconds"]
        == max(figures["seconds_compute"], figures["seconds_memory"], figures["seconds_links"])
        > 0
    )
    assert 0 < figures["utilization"] < 1


def test_the_state_is_donated(planned):
    """Else old and new state would stand in memory at once: the peak would hold them twice."""
    figures = planned[1]
    assert (
        figures["peak"]
        < figures["parameters"]
        + figures["optimizer"]
        + figures["other_arguments"]
        + figures["temporaries"]
        + 0.05 * figures["parameters"]
    )


def test_no_stacked_parameter_is_gathered_whole(planned, wide):
    """Each layer's parameters are gathered as the layer needs them, in bfloat16, never those of all layers at once."""
    gathered = [one for one in planned[1]["collectives"] if one["kind"] == "all-gather"]
    largest = 2 * wide.embed_dim * 2 * wide.hidden_dim  # gate and up projection of one layer
    assert gathered and max(one["size"] for one in gathered) <= largest
    assert {one["shape"].split("[")[0] for one in gathered if one["size"] > 1 << 18} == {"bf16"}


def test_gradients_move_no_more_than_they_must(planned, wide):
    """The ideal: each matrix's gradient is scattered once as it is summed, in the dtype of the backward pass: (n − 1)/n of its bytes leave a chip."""
    figures = planned[1]
    matrices = wide.num_parameters - wide.vocab_size * wide.embed_dim
    ideal = 0.75 * 2 * matrices
    moved = sum(
        one["traffic"]
        for one in figures["collectives"]
        if one["kind"] in ("reduce-scatter", "all-reduce")
    )
    assert 0.9 * ideal < moved <= 1.2 * ideal


def test_what_does_not_fit_exits_1(run, capsys):
    """Every chip would hold all of Gemma 2 2B's state: 29 GiB."""
    candidates = list(plan.candidates(recipes_config("gemma2_2b"), 4, 1, 16 * 2**30))
    assert candidates and all(np.prod(fields["mesh"][1:]) >= 2 for fields in candidates)
    nothing = dict.fromkeys(
        (
            "slices",
            "rows",
            "row_length",
            "micro_batches",
            "chips",
            "temporaries",
            "other_arguments",
            "compile_seconds",
        ),
        0,
    )
    named = {
        "size": "x",
        "topology": "v5e:2x2",
        "mesh": (4, 1, 1),
        "remat": "full",
        "collectives": [],
    }
    memory = {
        "parameters": 10 * 2**30,
        "optimizer": 20 * 2**30,
        "peak": 30 * 2**30,
        "memory": 16.0 * 2**30,
    }
    work = {
        "model_flops": 1.0,
        "program_flops": 2.0,
        "seconds_compute": 1.0,
        "seconds_memory": 0.5,
        "seconds_links": 2.0,
    }
    big = plan.Plan(**nothing, **named, **memory, **work)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "make_plan", lambda *arguments: big)
        assert run() == 1
    assert "does NOT fit, 14.00 GiB too much" in capsys.readouterr().out
    assert big.seconds == 2.0 and big.utilization == 0.25


def recipes_config(size):
    from gemma_encoder.experiments import glue

    return glue.get_config(f"mnli,size={size}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"topology": "v9:2x2"}, "plans are made for v5e, v5p, v6e"),
        ({"topology": "v5e:3x7"}, "--topology=v5e:3x7"),
        ({"mesh": "(3,1,1)"}, "does not fit 4 devices"),
        ({"config": "experiments/nothing.py"}, "nothing.py"),
    ],
)
def test_bad_input_exits_2_with_one_line(run, arguments, message, capsys):
    assert run(**arguments) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(error) == 1 and message in error[0]


def test_scans_are_counted_fully():
    """A scan over layers does what the same layers one after another do, backward pass and recomputation included."""
    weights = jnp.ones((5, 8, 8))

    def layer(x, w):
        return jnp.tanh(x @ w), None

    def scanned(x, weights):
        return jax.lax.scan(jax.checkpoint(layer), x, weights)[0].sum()

    def unrolled(x, weights):
        for w in weights:
            x, _ = jax.checkpoint(layer)(x, w)
        return x.sum()

    found = [
        flops.count(jax.make_jaxpr(jax.grad(function, (0, 1)))(jnp.ones((4, 8)), weights).jaxpr, 1)
        for function in (scanned, unrolled)
    ]
    assert (
        found[0] == found[1] == 5 * 4 * (2 * 4 * 8 * 8)
    )  # forward, forward again, and two products backward


def test_what_each_chip_does_is_counted_for_all():
    mesh = sharding.make_mesh((4, 1, 1), jax.devices()[:4])
    product = jax.shard_map(
        lambda x, w: x @ w, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data")
    )
    assert (
        flops.count(jax.make_jaxpr(product)(jnp.ones((8, 16)), jnp.ones((16, 32))).jaxpr, 4)
        == 2 * 8 * 16 * 32
    )


HLO = """\
%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %all-gather.1 = bf16[4,640]{1,0:T(8,128)(2,1)} all-gather(%x), channel_id=3, replica_groups=mesh['a'=4,'b'=2] {'a'}, dimensions={0}
  %f = bf16[4,640]{1,0} fusion(%y), kind=kCustom, calls=%async_collective_fusion.1
  %s = bf16[160]{0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.7
}

%async_collective_fusion.1 (q: bf16[1,640]) -> bf16[4,640] {
  %all-gather.2 = bf16[4,640]{1,0} all-gather(%q), channel_id=3, replica_groups=mesh['a'=4,'b'=2] {'a'}, dimensions={0}
}

%all-reduce-scatter.7 (r: bf16[640]) -> bf16[160] {
  %all-reduce.9 = bf16[640]{0} all-reduce(%r), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
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


def test_collectives_are_counted_as_often_as_they_run():
    gather, scatter, reduce = sorted(
        hlo.collectives(HLO, 8), key=lambda one: one.kind.replace("reduce-scatter", "b")
    )[:1] + sorted(
        (one for one in hlo.collectives(HLO, 8) if one.kind != "all-gather"),
        key=lambda one: -one.times,
    )
    assert (
        gather == hlo.Collective("all-gather", "bf16[4,640]", 2 * 4 * 640, 4, 13)
        and gather.traffic == 13 * 0.75 * 5120
    )
    assert (
        scatter == hlo.Collective("reduce-scatter", "bf16[640]", 320, 4, 13)
        and scatter.traffic == 13 * 3 * 320
    )
    assert (
        reduce == hlo.Collective("all-reduce", "f32[100]", 400, 8, 1)
        and reduce.traffic == 2 * 7 / 8 * 400
    )


class Device:
    """Enough of a TPU of one of several slices to be laid out."""

    def __init__(self, number, slice_index):
        self.id, self.slice_index, self.process_index, self.platform, self.device_kind = (
            number,
            slice_index,
            slice_index,
            "cpu",
            "cpu",
        )


def test_slices_hold_a_part_of_the_data_axis_each(monkeypatch):
    monkeypatch.setattr(sharding, "Mesh", lambda grid, axes, axis_types: grid)
    devices = [Device(number, number // 4) for number in range(8)]
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
    """With the batches that launch/PLANS.md states."""
    fields = [
        f"--config.batch.rows={rows}",
        "--config.batch.row_length=512",
        "--config.max_length=512",
    ]
    assert run(*fields, config=f"experiments/msmarco.py:size={size}", topology=topology) == 0
