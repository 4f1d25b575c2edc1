"""The rule that divides parameters, and what is read out of HLO."""

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from jaxdiff import parallel
from jaxdiff.parallel import PartitionSpec as P
from jaxdiff.parallel import param_spec
from jaxdiff.training.collectives import Collective, collectives, collectives_table

MESH = AbstractMesh((2, 2, 2), parallel.AXES, axis_types=parallel.AXIS_TYPES)


def test_a_mesh_needs_a_divisor():
    with pytest.raises(ValueError, match="fsdp 3 must divide"):
        parallel.mesh(fsdp=3, devices=jax.devices()[:1])
    with pytest.raises(ValueError, match="fsdp 1 x tensor 2 must divide"):
        parallel.mesh(tensor=2, devices=jax.devices()[:1])


def test_the_largest_divisible_axis_is_split():
    assert param_spec("conv_in/kernel", (3, 3, 8, 16), 4) == P(None, None, None, "fsdp")
    assert param_spec("proj_in/kernel", (16, 8), 4) == P("fsdp")
    assert param_spec("proj_in/kernel", (18, 8), 4) == P(None, "fsdp")
    assert param_spec("proj_in/kernel", (18, 7), 4) == param_spec("logit_scale", (), 4) == P()
    assert param_spec("norm/scale", (64,), 4) == P()


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        ("unet/attn1/to_k/kernel", (8, 8), P("fsdp", "tensor")),
        ("unet/attn1/to_out_0/kernel", (8, 8), P("tensor", "fsdp")),
        ("unet/attn1/to_out_0/bias", (8,), P()),  # added once, after the sum
        ("unet/ff/net_0_proj/bias", (8,), P("tensor")),
        ("opt_state/1/0/mu/unet/ff/net_2/kernel", (8, 8), P("tensor", "fsdp")),
        ("text_encoder/encoder/layers_0/self_attn_q_proj/kernel", (8, 8), P("fsdp", "tensor")),
        ("text_encoder/encoder/layers_0/mlp_fc2/kernel", (8, 8), P("tensor", "fsdp")),
        ("unet/resnets_1/conv1/kernel", (3, 3, 8, 8), P(None, None, "fsdp", "tensor")),
        ("unet/resnets_1/conv2/kernel", (3, 3, 8, 8), P(None, None, "tensor", "fsdp")),
        ("unet/resnets_1/conv2/kernel", (3, 3, 7, 8), P(None, None, None, "fsdp")),  # no half of 7
        ("vae/encoder/mid_block/attentions_0/to_q/kernel", (8, 8), P("fsdp")),  # one head
        ("text_encoder/embeddings_token_embedding/embedding", (20, 8), P("fsdp")),
    ],
)
def test_pairs_are_split_by_columns_then_by_rows(path, shape, spec):
    assert param_spec(path, shape, fsdp=2, tensor=2) == spec


def test_moments_and_averages_are_split_as_their_parameters(tiny):
    import optax

    params = tiny[1]
    state = {"params": params, "opt": optax.adam(1e-3).init(params)}
    found = parallel.param_sharding(MESH, state)
    specs = [[s.spec for s in jax.tree.leaves(tree)] for tree in (found["params"], found["opt"][0].mu)]
    assert specs[0] == specs[1]
    assert {"tensor", "fsdp"} <= {axis for spec in specs[0] for axis in spec}


def test_the_table_adds_up(tiny):
    params = tiny[1]
    rows = parallel.sharded_groups(MESH, params)
    leaves = jax.tree.leaves(params)
    assert sum(r.arrays for r in rows) == len(leaves)
    assert sum(r.size for r in rows) == sum(x.nbytes for x in leaves)
    for row in rows:
        pieces = 2 ** sum(axis is not None for axis in row.spec)
        assert row.per_device == row.size / pieces
    lines = parallel.sharding_table(MESH, params).splitlines()
    assert len(lines) == len(rows) + 2
    assert "unet/attn1/to_q/kernel" in "".join(lines)


def test_one_device_fetches_what_it_holds():
    np.testing.assert_array_equal(parallel.fetch({"x": jax.numpy.arange(3)})["x"], [0, 1, 2])


HLO = """
HloModule jit_step

%body (p: (f32[8], s32[])) -> (f32[8], s32[]) {
  %ar = (f32[8]{0}, bf16[2,2]{1,0}) all-reduce(%a, %b), replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
}

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %s = f32[] add(%x, %y)
}

ENTRY %main (p: f32[16]) -> f32[16] {
  %g = f32[16]{0} all-gather(%p), channel_id=1, replica_groups=[2,4]<=[2,2,2]T(1,0,2), dimensions={0}
  %r = f32[4]{0} reduce-scatter(%g), replica_groups=mesh['x'=2,'y'=2,'z'=2] {'x'}, to_apply=%add
  %c = f32[4]{0} collective-permute(%r), source_target_pairs={{0,1},{1,0}}
  %own = f32[4]{0} all-reduce(%c), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}, to_apply=%add
  %w = (f32[8], s32[]) while(%t), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"3"}}
}
"""


def test_collectives_are_counted_by_kind_and_axes_and_turns_of_loops():
    rows = {(r.kind, r.axes): r for r in collectives(HLO, MESH.shape)}
    assert rows[("all-reduce", ("tensor",))] == ("all-reduce", ("tensor",), 2, 6, 3 * (8 * 4 + 4 * 2))
    assert rows[("all-gather", ("data", "tensor"))].size == 64
    assert rows[("reduce-scatter", ("data",))].size == 2 * 16
    assert rows[("collective-permute", ("tensor",))].size == 16
    assert len(rows) == 4


def test_a_ring_sends_all_but_its_own_part():
    assert Collective("all-reduce", ("data",), 4, 1, 100).sent == 150
    assert Collective("all-gather", ("data",), 4, 1, 100).sent == 75
    assert "| all-gather | data | 4 | 1 | 1.0 | 0.8 |" in collectives_table(
        [Collective("all-gather", ("data",), 4, 1, 10**6)]
    )
