"""Every network equals PyTorch's on the same weights: live where torch is installed, by golden outputs everywhere."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from jaxdiff import parallel
from jaxdiff.config import CLIPTextConfig, CLIPVisionConfig, ConfigError, UNetConfig, VAEConfig
from jaxdiff.io.tensor_files import load_tensors
from jaxdiff.models.clip import CLIPTextModel, CLIPVisionModel
from jaxdiff.models.convolution import convolve
from jaxdiff.models.layers import timestep_embedding
from jaxdiff.models.model import encode
from jaxdiff.models.text_encoding import encode_text
from jaxdiff.models.tiling import decode_tiled
from jaxdiff.models.unet import UNet2DConditionModel
from jaxdiff.models.vae import AutoencoderKL
from jaxdiff.text.chunks import tokens
from tests.support import networks
from tests.support.comparison import TOLERANCE, drawn, error, shapes_of

GOLDEN = Path(__file__).parent / "golden" / "models.npz"
CASES = (
    [f"unet/{n}" for n in networks.UNETS]
    + ["unet/sd1/9", "unet/sd1/32"]
    + [f"vae/{n}" for n in networks.VAES]
    + [f"text/{n}" for n in networks.TEXTS]
    + ["vision/small"]
)


@functools.cache
def case(name: str):
    """(module, inputs, a compiled function of the variables that gives the named outputs) of one comparison."""
    module, args, run = written_out(name)
    return module, args, jax.jit(run)


def written_out(name: str):
    """The same before compilation."""
    kind, variant = name.split("/")[:2]
    if kind == "unet":
        side = int(name.split("/")[2]) if name.count("/") == 2 else 8
        inputs = networks.unet_inputs(networks.UNETS[variant], side)
        names = ("x", "t", "embeddings", "pooled", "time_ids", "attention_mask", "class_labels", "guidance")
        args = tuple(inputs.get(n) for n in names)
        module = UNet2DConditionModel(UNetConfig.from_dict(networks.UNETS[variant]))
        return module, args, lambda v: {"output": module.apply(v, *args)}
    if kind == "vae":
        images = networks.uniform_images(2, 16, 24, 3)
        module = AutoencoderKL(VAEConfig.from_dict(networks.VAES[variant]))

        def run(v):
            mean, logvar = module.apply(v, images, method="encode")
            return {"mean": mean, "logvar": logvar, "decoded": module.apply(v, mean, method="decode")}

        return module, (images,), run
    if kind == "text":
        module = CLIPTextModel(CLIPTextConfig.from_dict(networks.TEXTS[variant]))

        def run(v):
            out = module.apply(v, networks.TOKENS)
            pooled = {"pooled": out.pooled} if out.projected is None else {"projected": out.projected}
            return {"last_hidden_state": out.last_hidden_state, "second_to_last": out.hidden_states[-2], **pooled}

        return module, (networks.TOKENS,), run
    pixels = networks.uniform_images(2, 32, 32, 3)
    module = CLIPVisionModel(CLIPVisionConfig.from_dict(networks.SMALL_VISION))
    return module, (pixels,), lambda v: {"image_embeds": module.apply(v, pixels)}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd1", "only_cross"])
def test_masked_tokens_are_not_there(name):
    """Also where the image's own tokens are never attended to; rounding of sums in another order."""
    module, args, run = case(f"unet/{name}")
    variables, (x, t, embeddings, *_) = drawn(module, args), args
    mask = np.repeat([[1.0, 0.0]], len(x), 0).repeat(embeddings.shape[1], 1)
    longer = np.concatenate([embeddings, 3 - embeddings], 1)
    apply = jax.jit(lambda mask: module.apply(variables, x, t, longer, attention_mask=mask))
    masked, whole = apply(mask), apply(np.ones_like(mask))
    assert error(masked, run(variables)["output"]) < TOLERANCE
    assert error(masked, whole) > 100 * TOLERANCE


def check(ours, reference) -> None:
    assert set(ours) == set(reference)
    for name in ours:
        assert error(ours[name], reference[name]) < TOLERANCE, name


# In long runs only: sd1/9 is the network of sd1; the upscaler's has other input channels and cross-attention alone.
SIBLINGS = ("unet/sd1", "unet/only_cross", "unet/inpainting")


@pytest.mark.parametrize("name", [pytest.param(c, marks=[pytest.mark.slow] * (c in SIBLINGS)) for c in CASES])
def test_network_equals_golden_outputs(name):
    module, args, run = case(name)
    with np.load(GOLDEN) as golden:
        reference = {k.split(":")[1]: golden[k] for k in golden.files if k.split(":")[0] == name}
    check(run(drawn(module, args)), reference)


@pytest.mark.slow
@pytest.mark.parametrize("name", [c for c in CASES if c.count("/") == 1])
def test_network_read_from_files_equals_pytorch(name, tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    from tests.support import oracle

    build, run_reference, inputs = oracle.cases()[name]
    reference = build()
    weights = oracle.save(reference, tmp_path)
    module, args, run = case(name)
    assert module.config == type(module.config).load(tmp_path / "config.json")
    variables = {"params": load_tensors(weights, shapes_of(module, args), jnp.float32)}
    check(run(variables), run_reference(reference, inputs))


def test_text_encoder_is_causal():
    """No output depends on a later token: the gradient by the embeddings of later tokens is exactly zero."""
    module, args, _ = case("text/vit_l")
    variables = drawn(module, args)
    table = variables["params"]["embeddings_token_embedding"]["embedding"]
    tokens = jnp.array([[598, 5, 9, 17]])

    def third_state(embedding):
        params = variables["params"] | {"embeddings_token_embedding": {"embedding": embedding}}
        return module.apply({"params": params}, tokens).last_hidden_state[0, 2].sum()

    gradient = jax.jit(jax.grad(third_state))(jnp.asarray(table))
    assert np.all(gradient[17] == 0)
    assert np.all(np.abs(gradient[jnp.array([598, 5, 9])]).sum(-1) > 0)


@pytest.mark.slow  # a training step with and without it is compared in every run
def test_rematerialisation_changes_no_gradient():
    module, args, _ = case("unet/sd1")
    variables = drawn(module, args)

    def gradient(unet):
        return jax.jit(jax.grad(lambda v: (unet.apply(v, *args) ** 2).sum()))(variables)

    plain, remat = gradient(module), gradient(module.copy(remat=True))
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(remat), strict=True):
        assert error(b, a) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_stays_near_float32(dtype):
    """Rounding to 8 (bfloat16) or 11 (float16) bits at every operation: within eight roundings of the whole."""
    module, args, _ = case("unet/sd1")
    variables = drawn(module, args)
    exact = module.apply(variables, *args)
    rounded = module.copy(dtype=jnp.dtype(dtype)).apply(jax.tree.map(lambda x: jnp.asarray(x, dtype), variables), *args)
    assert rounded.dtype == dtype
    assert error(rounded, exact) < 8 * float(jnp.finfo(dtype).eps)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "features", "stride", "chunk"),
    [
        pytest.param((2, 3, 5, 512), 7, 1, 8192, id="gathered"),
        pytest.param((2, 3, 5, 512), 7, 2, 8192, id="gathered-strided"),
        pytest.param((2, 30, 20, 128), 256, 1, 8192, id="winograd"),
        pytest.param((2, 30, 20, 256), 132, 1, 500, id="winograd-chunks"),
    ],
)
def test_convolution_as_products_equals_xla(shape, features, stride, chunk, monkeypatch):
    """Values and gradients: sums of 9 * 512 products in two orders, float32 rounding of some 1e-6.

    Winograd's transforms add twice two numbers before and twice three after, each of which rounds once more.
    """
    monkeypatch.setattr("jaxdiff.models.cpu.CHUNK_POSITIONS", chunk)
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal(shape, np.float32), rng.standard_normal((3, 3, shape[-1], features), np.float32)
    rest = (stride, stride), ((1, 1), (1, 1))
    args = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
    text = jax.jit(lambda x, k: convolve(x, k, *rest, **args)).lower(x, kernel).as_text()
    assert jax.default_backend() != "cpu" or "convolution" not in text
    assert chunk != 500 or "while" in text
    reference, pull = jax.vjp(lambda x, k: jax.lax.conv_general_dilated(x, k, *rest, **args), x, kernel)
    computed, our_pull = jax.vjp(lambda x, k: convolve(x, k, *rest, **args), x, kernel)
    assert error(computed, reference) < TOLERANCE
    for ours, theirs in zip(our_pull(computed), pull(computed), strict=True):
        assert error(ours, theirs) < TOLERANCE


@pytest.mark.parametrize(("sizes", "products"), [((2, 1, 1), True), ((1, 2, 1), True), ((1, 1, 2), False)])
def test_convolutions_stay_whole_where_their_kernels_are_divided(sizes, products):
    """Over "tensor" alone: the other axes of a mesh divide examples, or kernels that are gathered before their use."""
    x, kernel = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((4, 32, 32, 64), (3, 3, 64, 64)))
    args = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
    with jax.sharding.use_abstract_mesh(AbstractMesh(sizes, parallel.AXES, axis_types=parallel.AXIS_TYPES)):
        jaxpr = jax.make_jaxpr(lambda x, k: convolve(x, k, (1, 1), ((1, 1), (1, 1)), **args))(x, kernel)
    assert ("dot_general" in str(jaxpr)) == products


@pytest.mark.slow
@pytest.mark.parametrize("name", [c for c in CASES if c.count("/") == 1])
def test_networks_in_an_application_of_other_settings(name):
    """With 64-bit types and without implicit broadcasting, outputs keep their shapes and types."""
    module, args, run = written_out(name)
    usual = jax.eval_shape(run, {"params": shapes_of(module, args)})
    with jax.enable_x64(True), jax.numpy_rank_promotion("raise"):
        assert jax.eval_shape(run, {"params": shapes_of(module, args)}) == usual


@pytest.mark.slow
def test_a_models_functions_in_an_application_of_other_settings(tiny):
    """With 64-bit types and without implicit broadcasting, values are the same up to rounding, draws included."""
    model, params = tiny
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    texts = tokens(model, ["a (red) castle", "blue"])

    @jax.jit
    def run(params):
        latents = encode(model, params, images, jax.random.key(0, impl="threefry2x32"))
        return latents, decode_tiled(model, params, latents, 6, 2), *encode_text(model, params, texts)

    usual = jax.tree.map(np.asarray, run(params))
    with jax.enable_x64(True), jax.numpy_rank_promotion("raise"):
        for ours, expected in zip(jax.tree.leaves(run(params)), jax.tree.leaves(usual), strict=True):
            assert ours.dtype == expected.dtype
            np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_timestep_embedding_of_zero_and_one():
    embedding = timestep_embedding(jnp.array([0.0, 1.0]), 8)
    np.testing.assert_allclose(embedding[0], [1, 1, 1, 1, 0, 0, 0, 0])
    np.testing.assert_allclose(embedding[1, [0, 4]], [np.cos(1), np.sin(1)], rtol=1e-6)


def test_unknown_block_is_named():
    config = UNetConfig.from_dict(networks.SMALL_UNET | {"down_block_types": ["KDownBlock2D", "DownBlock2D"]})
    module, args, _ = case("unet/sd1")
    with pytest.raises(ConfigError, match=r"KDownBlock2D.*known are DownBlock2D"):
        shapes_of(module.copy(config=config), args)
