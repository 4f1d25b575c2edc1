"""Attention against the formula in float64, and in bounded memory from the number of queries where it is chunked."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu

from jaxdiff import parallel
from jaxdiff.models import fused_attention
from jaxdiff.models.attention import (
    CHUNK_FROM,
    SCORES,
    _bounded,
    _float16,
    _fused,
    attention,
    forward_differentiable,
    split_heads,
)
from jaxdiff.models.cpu import CHUNK_QUERIES
from jaxdiff.models.fused_attention import has_cudnn, pallas_attention
from tests.support.comparison import error

HEADS = 2


def inputs(queries: int, keys: int, width: int = 16):
    rng = np.random.default_rng(0)
    return [rng.standard_normal((2, n, width)).astype(np.float32) for n in (queries, keys, keys)]


def formula(q, k, v, heads=HEADS, causal=False):
    """softmax(q kᵀ / sqrt(d)) v, head by head."""
    out = []
    for one in zip(*(np.split(x.astype(np.float64), heads, -1) for x in (q, k, v)), strict=True):
        scores = one[0] @ one[1].transpose(0, 2, 1) / np.sqrt(one[0].shape[-1])
        scores = np.where(np.tri(*scores.shape[1:]), scores, -np.inf) if causal else scores
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out.append(weights / weights.sum(-1, keepdims=True) @ one[2])
    return np.concatenate(out, -1)


@pytest.mark.parametrize(("queries", "keys"), [(7, 5), (CHUNK_FROM, CHUNK_FROM), (CHUNK_FROM + 77, 9)])
def test_attention_is_the_formula(queries, keys):
    """Rounding of sums of at most 1,024 float32 products: some 1e-6. The last shape fills its last chunk in part."""
    q, k, v = inputs(queries, keys)
    assert error(attention(q, k, v, HEADS), formula(q, k, v)) < 1e-5


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(("queries", "causal"), [(7, False), (7, True), (CHUNK_FROM, False)])
def test_half_precision_is_the_formula_of_its_inputs(queries, causal, dtype):
    """But for the rounding of the weights and of the result, each by half a unit in the last place at most."""
    q, k, v = (jnp.asarray(x, dtype) for x in inputs(queries, queries if causal else 5))
    ours = jax.jit(lambda *x: attention(*x, HEADS, causal=causal))(q, k, v)
    assert ours.dtype == dtype
    exact = (np.asarray(x, np.float32) for x in (q, k, v))
    assert error(np.asarray(ours, np.float32), formula(*exact, causal=causal)) < 2 * jnp.finfo(dtype).eps


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("queries", [7, CHUNK_FROM])
def test_a_bias_hides_keys_or_counts_them_in_part(queries, dtype):
    """A key in two parts is that key, however each example divides it; a hidden one is not there."""
    q, k, v = (jnp.asarray(x, dtype) for x in inputs(queries, 5))
    share = np.array([[0.3, 0.7, 0.0], [0.8, 0.2, 0.0]], np.float32)
    bias = jnp.log(jnp.concatenate([jnp.ones((2, 4)), share], -1))
    more = [jnp.concatenate([x, x[:, -1:], 9 + x[:, :1]], 1) for x in (k, v)]
    ours = jax.jit(lambda q, k, v: attention(q, k, v, HEADS, bias=bias))(q, *more)
    assert error(np.asarray(ours, np.float32), formula(*(np.asarray(x, np.float32) for x in (q, k, v)))) < 2 * max(
        jnp.finfo(dtype).eps, 5e-6
    )


@pytest.mark.slow
def test_chunked_gradients_are_those_of_the_whole():
    q, k, v = inputs(CHUNK_FROM + 3, 6)

    def loss(parts):
        def total(q, k, v):
            return sum((attention(x, k, v, HEADS) ** 2).sum() for x in jnp.split(q, parts, 1))

        return jax.grad(total, (0, 1, 2))(q, k, v)

    whole, small = loss(1), loss([CHUNK_QUERIES, 2 * CHUNK_QUERIES])  # the second way never reaches the chunked form
    for a, b in zip(whole, small, strict=True):
        assert error(a, b) < 1e-5


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the chunked form is a CPU's")
def test_memory_is_a_chunks_not_the_squares():
    """4,096 tokens, 8 heads of width 40, as at the top of SD 1.5's UNet: scores in full would take 1,074 MB."""
    x = jax.ShapeDtypeStruct((2, 4096, 320), jnp.float32)
    compiled = jax.jit(lambda q, k, v: attention(q, k, v, 8)).lower(x, x, x).compile()
    memory = compiled.memory_analysis().temp_size_in_bytes
    copies = 4 * 2 * 4096 * 320 * 4  # of queries, keys, values and output with the heads moved
    print(f"4,096-token attention: {memory / 1e6:.0f} MB of temporaries")
    assert memory < copies + 4 * CHUNK_QUERIES * 4096 * 4 * 2


# Elsewhere than on a CPU


def bounded(q, k, v, bias=None, budget=SCORES, heads=HEADS, fused=_fused):
    """The form for GPUs and TPUs, of [B, N, H * d]."""
    fused = functools.partial(fused, causal=False)
    return _bounded(*(split_heads(x, heads) for x in (q, k, v)), bias, fused, budget).reshape(q.shape)


@pytest.mark.parametrize("fused", [_fused, _float16])
@pytest.mark.parametrize("budget", [1, 3000, 4 * 2 * HEADS * 77 * 9])  # a query at a time, 20, and all
def test_queries_in_chunks_are_the_whole(fused, budget):
    dtype = jnp.float16 if fused is _float16 else jnp.float32
    q, k, v = (jnp.asarray(x, dtype) for x in inputs(77, 9))
    bias = jnp.log(jnp.tile(jnp.array([[1.0, 0.0, 0.5]]), (2, 3)))
    exact = [np.asarray(x, np.float32) for x in (q, k, v)]
    kept = [np.concatenate([x[:, i::3] for i in (0, 0, 2)], 1) for x in exact[1:]]  # weights 1 and 0.5 as 2 to 1
    ours = jax.jit(functools.partial(bounded, budget=budget, fused=fused))(q, k, v, bias)
    assert ours.dtype == dtype
    assert error(np.asarray(ours, np.float32), formula(exact[0], *kept)) < 2 * max(jnp.finfo(dtype).eps, 5e-6)


def test_gradients_of_queries_in_chunks_are_those_of_the_whole():
    q, k, v = inputs(77, 9)

    def gradient(budget):
        return jax.grad(lambda *x: (bounded(*x, budget=budget) ** 2).sum(), (0, 1, 2))

    for a, b in zip(*(jax.jit(gradient(budget))(q, k, v) for budget in (3000, SCORES)), strict=True):
        assert error(a, b) < 1e-5


@pytest.mark.parametrize("gradient", [False, True])
def test_memory_of_queries_in_chunks_is_a_chunks(gradient):
    """As above, with 32 MiB of scores at once; the weights are as many, and so are the gradients of both.

    A gradient has copies of the inputs for the way forward and the way back, and of what it returns.
    """
    x = jax.ShapeDtypeStruct((2, 4096, 320), jnp.float32)

    def function(q, k, v):
        return bounded(q, k, v, budget=2**25, heads=8)

    compiled = jax.jit(jax.grad(lambda *x: function(*x).sum(), (0, 1, 2)) if gradient else function)
    memory = compiled.lower(x, x, x).compile().memory_analysis().temp_size_in_bytes
    copies = 4 * 2 * 4096 * 320 * 4 * (3 if gradient else 1)  # of queries, keys, values and output; see above
    print(f"4,096-token attention, {gradient=}: {memory / 1e6:.0f} MB of temporaries")
    assert memory < copies + 2**25 * (5 if gradient else 3)


def lowered(platform, n, m, width, heads, dtype, bias=False, gradient=False) -> str:
    """The program of attention of two examples for another platform than this."""
    q, k = (jax.ShapeDtypeStruct((2, tokens, width), dtype) for tokens in (n, m))

    def function(q, k, v):
        hidden = jnp.zeros((2, m)) if bias else None
        return attention(q, k, v, heads, bias=hidden).astype(jnp.float32).sum()

    def derivative(q, k, v):
        return jax.jvp(function, (q, k, v), (q, k, v))[1]

    kinds = {False: function, True: jax.grad(function, (0, 1, 2)), "forward": derivative}
    program = jax.jit(kinds[gradient])
    return program.trace(q, k, k).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_large_images_go_in_chunks_on_gpus_without_a_kernel(dtype):
    """SD 1.5 with guidance: scores of 1 GiB at 512 x 512 are made at once, those of 16 GiB at 1,024 x 1,024 are not."""
    for tokens, loops in ((4096, 0), (16384, 1)):
        assert lowered("cuda", tokens, tokens, 320, 8, dtype).count("stablehlo.while") == loops


@pytest.fixture
def cudnn(monkeypatch):
    """As if cuDNN were installed."""
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)
    has_cudnn.cache_clear()
    yield
    has_cudnn.cache_clear()


KERNELS = {"cuda": "__cudnn$fmha", "tpu": "tpu_custom_call"}
SHAPES = {  # (tokens, keys, width, heads) -> the platforms with a kernel for bfloat16
    "sd1": ((4096, 4096, 320, 8), {"cuda", "tpu"}),
    "sd1, second level": ((1024, 1024, 640, 8), {"cuda", "tpu"}),
    "sdxl": ((4096, 4096, 640, 10), {"cuda", "tpu"}),
    "odd": ((1100, 1100, 64, 1), {"cuda", "tpu"}),
    "autoencoder": ((4096, 4096, 512, 1), {"tpu"}),  # wider than cuDNN's takes
    "text": ((4096, 77, 320, 8), set()),
    "small": ((256, 256, 1280, 8), set()),
}


@pytest.mark.parametrize("name", SHAPES)
def test_many_tokens_go_to_the_kernel(cudnn, name):
    shape, platforms = SHAPES[name]
    for platform, kernel in KERNELS.items():
        assert lowered(platform, *shape, jnp.bfloat16).count(kernel) == (platform in platforms)
        assert kernel not in lowered(platform, *shape, jnp.bfloat16, bias=True)
    assert not any(kernel in lowered("cpu", *shape, jnp.bfloat16) for kernel in KERNELS.values())


@pytest.mark.parametrize(
    ("dtype", "platforms"), [("bfloat16", {"cuda", "tpu"}), ("float16", {"cuda"}), ("float32", {"tpu"})]
)
def test_a_kernel_takes_its_own_types(cudnn, dtype, platforms):
    """And has one of its own for gradients."""
    for platform, kernel in KERNELS.items():
        count = lowered(platform, 4096, 4096, 320, 8, dtype, gradient=True).count(kernel)
        assert count == ({"cuda": 2, "tpu": 3}[platform] if platform in platforms else 0)


@pytest.mark.parametrize("platform", KERNELS)
def test_a_derivative_of_forward_mode_needs_no_kernel(cudnn, platform):
    """Kernels have a backward pass alone, and say so."""
    with pytest.raises(TypeError, match="forward-mode"):
        lowered(platform, 4096, 4096, 320, 8, jnp.bfloat16, gradient="forward")
    with forward_differentiable():
        text = lowered(platform, 4096, 4096, 320, 8, jnp.bfloat16, gradient="forward")
    assert KERNELS[platform] not in text
    assert KERNELS[platform] in lowered(platform, 4096, 4096, 320, 8, jnp.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize(("n", "m"), [(128, 128), (133, 200)])
def test_the_kernel_of_tpus_is_the_formula(n, m, monkeypatch):
    """By Pallas' interpreter; the second shape is filled up to whole blocks. Rounding as above."""
    monkeypatch.setattr(fused_attention, "BLOCK", 128)
    q, k, v = inputs(n, m, 8)

    def gradient(function):
        return jax.jit(
            jax.value_and_grad(lambda *x: (function(*(split_heads(y, HEADS) for y in x)) ** 2).sum(), (0, 1, 2))
        )

    with pltpu.force_tpu_interpret_mode():
        ours = gradient(pallas_attention)(q, k, v)
    for a, b in zip(
        jax.tree.leaves(ours),
        jax.tree.leaves(gradient(functools.partial(_fused, bias=None, causal=False))(q, k, v)),
        strict=True,
    ):
        assert error(a, b) < 1e-5


def test_on_a_mesh_each_device_gives_the_kernel_its_examples_and_heads(cudnn):
    mesh = jax.sharding.AbstractMesh((2, 2, 2), parallel.AXES, axis_types=parallel.AXIS_TYPES)
    for examples, heads, shape in ((4, 8, "[1,4,4096,40]"), (4, 5, None), (2, 8, None)):
        x = jax.ShapeDtypeStruct((examples, 4096, 40 * heads), jnp.bfloat16)
        with jax.sharding.use_abstract_mesh(mesh):
            jaxpr = str(jax.make_jaxpr(lambda q, k, v, heads=heads: attention(q, k, v, heads))(x, x, x))
        assert ("pallas_call" in jaxpr) == (shape is not None)
        assert shape is None or f"bf16{shape}" in jaxpr


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the TPU's compiler: pip install libtpu")
@pytest.mark.parametrize("gradient", [False, True])
def test_the_compiler_for_tpus_takes_the_kernel(gradient, monkeypatch):
    """Without a TPU: the widths of SD 1.5, SDXL and the autoencoder, and tokens that fill no block."""
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])
    for n, m, width, heads in [shape for shape, platforms in SHAPES.values() if "tpu" in platforms]:
        q, k = (jax.ShapeDtypeStruct((1, tokens, width), jnp.bfloat16, sharding=sharding) for tokens in (n, m))

        def function(q, k, v, heads=heads):
            return attention(q, k, v, heads).astype(jnp.float32).sum()

        program = jax.jit(jax.grad(function, (0, 1, 2)) if gradient else function)
        compiled = program.trace(q, k, k).lower(lowering_platforms=("tpu",)).compile()
        assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == (3 if gradient else 1)


def test_a_mesh_divides_the_scores():
    """Eight examples on four devices are two a device, with scores of 1 GiB."""
    mesh = jax.sharding.AbstractMesh((2, 2), ("data", "fsdp"), axis_types=parallel.AXIS_TYPES[:2])
    x = jax.ShapeDtypeStruct((8, 4096, 320), jnp.float16)  # which no kernel takes here

    def chunks():
        jaxpr = jax.make_jaxpr(lambda q, k, v: attention(q, k, v, 8))(x, x, x)
        return [eqn.params["length"] for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]

    for devices, expected in ((mesh, []), (mesh.update(axis_sizes=(1, 2)), [2])):
        with jax.sharding.use_abstract_mesh(devices):
            assert chunks() == expected
