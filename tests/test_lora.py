"""LoRA: what its files mean and how they come back, the algebra, and files that do not fit."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxdiff.errors import WeightsError
from jaxdiff.io.lora import init_lora, load_lora, merge_lora, read_lora, save_lora
from jaxdiff.io.lora_layers import layers
from jaxdiff.io.lora_names import list_orders
from jaxdiff.io.torch_names import to_torch_layout
from tests.support.lora_files import ATTENTION, drawn_params, kohya, matrices, merge, peft, small_model, written


@pytest.fixture(scope="module")
def sd1():
    model = small_model()
    return model, drawn_params(model)


def convolution(params, name: str = "conv_in"):
    """PyTorch's weight [out, in, 3, 3] of one of the UNet's convolutions."""
    return to_torch_layout(("kernel",), np.asarray(params["unet"][name]["kernel"]))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(32, 1, 1, 1), (32, 1), (32,), (1, 4, 1, 1), (1, 4)])
def test_dora_by_output_and_by_input(shape, sd1, tmp_path):
    """The equation written out in PyTorch's layout; half the scale is half the way."""
    model, params = sd1
    rng = np.random.default_rng(0)
    down, up, scale = (rng.uniform(0.5, 2, size).astype(np.float32) for size in ((2, 4, 3, 3), (32, 2, 1, 1), shape))
    stem = "lora_unet_conv_in"
    file = tmp_path / "dora.safetensors"
    save_file({f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.dora_scale": scale}, file)
    old = convolution(params).astype(np.float64)
    whole = old + np.einsum("or,rihw->oihw", up[..., 0, 0], down)
    by_input = shape[0] == 1
    norm = np.sqrt((whole**2).sum((0, 2, 3) if by_input else (1, 2, 3), keepdims=True))
    new = whole / norm * scale.reshape((1, -1, 1, 1) if by_input else (-1, 1, 1, 1))
    lora = read_lora(model, file)
    for strength in (1.0, 0.5, 0.0):
        merged = convolution(merge(params, lora, strength))
        np.testing.assert_allclose(merged, old + strength * (new - old), rtol=1e-5, atol=1e-6)
    for layout in ("kohya", "diffusers"):
        if layout == "diffusers" and by_input:
            with pytest.raises(
                WeightsError, match="a magnitude for each input, which the layout diffusers has no place"
            ):
                save_lora(tmp_path / "again.safetensors", model, lora, layout)
            continue
        save_lora(tmp_path / "again.safetensors", model, lora, layout)
        jax.tree.map(np.testing.assert_array_equal, read_lora(model, tmp_path / "again.safetensors"), lora)


def test_locon_is_three_convolutions(sd1, tmp_path):
    torch = pytest.importorskip("torch")
    model, params = sd1
    rng = np.random.default_rng(0)
    sizes = {"down": (2, 4, 1, 1), "mid": (2, 2, 3, 3), "up": (32, 2, 1, 1)}
    parts = {name: rng.standard_normal(size).astype(np.float32) for name, size in sizes.items()}
    stem = "lora_unet_conv_in"
    tensors = {f"{stem}.lora_{name}.weight": x for name, x in parts.items()}
    save_file(tensors | {f"{stem}.alpha": np.array(1.0, np.float32)}, tmp_path / "locon.safetensors")
    merged = load_lora(model, params, tmp_path / "locon.safetensors")
    x = torch.from_numpy(rng.standard_normal((1, 4, 6, 6)).astype(np.float32))
    conv = torch.nn.functional.conv2d
    down, mid, up = (torch.from_numpy(parts[name]) for name in sizes)
    expected = conv(x, torch.from_numpy(convolution(params).copy()), padding=1)
    expected = expected + 0.5 * conv(conv(conv(x, down), mid, padding=1), up)
    found = conv(x, torch.from_numpy(convolution(merged).copy()), padding=1)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("block", [("attn1", "attn2"), ("attn1", "ff", "attn2"), ("attn1", "attn2", "ff")])
@pytest.mark.parametrize("embeddings", [False, True])
def test_lists_without_names(block, embeddings, sd1, tmp_path):
    """Numbered tensors mean the same as named ones, whatever diffusers' order of a block was."""
    model, params = sd1
    named = {f"{m}.{n}": (down, up) for m, n, down, up in matrices(params, ATTENTION + r"|net\.0")}
    tensors = {"<cat>": np.zeros(24, np.float32)} if embeddings else {}
    expected = {}
    for order in list_orders(list(layers(params))):
        kinds = {re.search(r"attn1|attn2|ff|self_attn", layer.name)[0]: None for layer in order}
        if order and tuple(kinds) in (block, ("self_attn",)):
            for i, layer in enumerate(order):
                expected[layer.name] = named[layer.name]
                tensors |= zip((f"{layer.module}:{i}:{d}" for d in ("down", "up")), named[layer.name], strict=True)
    save_file(tensors, tmp_path / "list.safetensors")
    lora = read_lora(model, tmp_path / "list.safetensors")
    assert lora.keys() == expected.keys()
    for name, (down, up) in expected.items():
        np.testing.assert_array_equal(lora[name].down, down.T)
        np.testing.assert_array_equal(lora[name].up, up.T)


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_saving_and_reading_back(layout, dtype, sd1, tmp_path):
    model, params = sd1
    file = written(tmp_path / "a.safetensors", kohya, matrices(params, r"^unet.*(conv1|attn2)|layers\.0\."))
    lora = jax.tree.map(lambda x: x.astype(dtype), read_lora(model, file))
    assert {f.alpha for f in lora.values()} == {0.5, 2.0}
    save_lora(tmp_path / "b.safetensors", model, lora, layout)
    again = read_lora(model, tmp_path / "b.safetensors")
    assert {x.dtype.name for x in jax.tree.leaves(again)} == {dtype}
    if layout == "kohya":  # has a place for alpha
        assert jax.tree.structure(lora) == jax.tree.structure(again)
        jax.tree.map(np.testing.assert_array_equal, lora, again)
        save_lora(tmp_path / "c.safetensors", model, again, layout)
        assert (tmp_path / "b.safetensors").read_bytes() == (tmp_path / "c.safetensors").read_bytes()
    else:  # alpha / rank went into `up`, rounded once to its type
        bound = float(jnp.finfo(dtype).eps)
        ours, theirs = merge(params, again), merge(params, lora)
        for name in ("unet", "text_encoder"):
            jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=8 * bound), ours[name], theirs[name])


@pytest.fixture
def fresh(tiny):
    model, params = tiny
    lora = init_lora(model, params, 2, alpha=3.0, targets=("unet", "text_encoder"), key=jax.random.key(0))
    return params, jax.tree.map(lambda x: x + 0.1, lora)


def test_merging_is_linear_in_the_scale(fresh):
    params, lora = fresh

    def change(scale):
        return jax.tree.map(lambda x, y: x - y, merge(params, lora, scale), params)

    one = change(1.0)
    assert any(float(jnp.abs(x).max()) > 0.1 for x in jax.tree.leaves(one))
    # a difference of two weights of about 1, each rounded at 2**-24
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, -2 * y, atol=1e-6), change(-2.0), one)
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(change(0.0)))
    twice = merge(params, [lora, lora], [0.25, 0.75])
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), twice, merge(params, lora))


@pytest.mark.slow
def test_merging_is_jitted_differentiated_and_mapped(fresh):
    params, lora = fresh
    scales = jnp.array([0.0, 0.5, 2.0])
    mapped = jax.jit(jax.vmap(lambda s: merge_lora(params, lora, s)))(scales)
    for i, scale in enumerate(scales):
        jax.tree.map(
            lambda x, y, i=i: np.testing.assert_allclose(x[i], y, atol=1e-6), mapped, merge(params, lora, scale)
        )

    def total(lora, scale):
        return sum(jnp.sum(x**2) for x in jax.tree.leaves(merge(params, lora, scale)))

    gradient, slope = jax.jit(jax.grad(total, (0, 1)))(lora, 0.5)
    assert jax.tree.structure(gradient) == jax.tree.structure(lora)
    assert all(float(jnp.abs(x).max()) > 0 for x in jax.tree.leaves(gradient))
    # the total is quadratic in the scale: its central difference is exact but for rounding
    difference = (total(lora, 1.0) - total(lora, 0.0)) / 1.0
    np.testing.assert_allclose(slope, difference, rtol=1e-3)


def test_one_layer_at_a_time_is_merged(fresh, monkeypatch):
    """What is added is as large as the model and in float32: no more of it is held than one layer takes."""
    params, lora = fresh
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    matmul = jnp.matmul

    def in_float32() -> int:
        return sum(x.nbytes for x in jax.live_arrays() if x.dtype == jnp.float32)

    held, before = [], in_float32()
    monkeypatch.setattr(jnp, "matmul", lambda *x, **kwargs: held.append(in_float32()) or matmul(*x, **kwargs))
    merge_lora(params, [lora, lora], [0.5, 0.25])
    sizes = sorted(4 * f.down.size // f.rank * f.up.shape[-1] for f in lora.values())
    at_once = 2  # the kernel, and what the first of the two adds
    assert sum(sizes) > 2 * at_once * sizes[-1]
    assert max(held) - before <= at_once * sizes[-1]


def test_fresh_lora_changes_nothing_and_leaves_alpha_alone(tiny):
    model, params = tiny
    lora = init_lora(model, params, 2, alpha=3.0, key=jax.random.key(0))
    assert {f.alpha for f in lora.values()} == {3.0}
    assert {name.rsplit(".", 1)[1] for name in lora} == {"to_q", "to_k", "to_v", "0"}
    assert {x.ndim for x in jax.tree.leaves(lora)} == {2}  # thin matrices alone are leaves
    jax.tree.map(np.testing.assert_array_equal, merge(params, lora), params)
    with pytest.raises(WeightsError, match="rank 0 must be 1 or more"):
        init_lora(model, params, 0, key=jax.random.key(0))
    with pytest.raises(WeightsError, match="no layer of text_encoder_2"):
        init_lora(model, params, 2, targets=("text_encoder_2",), key=jax.random.key(0))


def test_types_of_parameters_stay(fresh):
    params, lora = fresh
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    merged = merge(half, lora)
    exact = merge(jax.tree.map(lambda x: x.astype(jnp.float32), half), lora)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y.astype(jnp.bfloat16)), merged, exact)


# ---- files that do not fit

STEM = "unet.conv_in"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "holds no LoRA"),
        ({"model.weight": (2, 2)}, "tensor model.weight is not part of a LoRA"),
        ({"base_model.model.conv_in.bias": (32,)}, r"is a LoRA \(whole layers or biases beside it\) adapter"),
        ({"base_model.model.conv_in.base_layer.bias": (32,)}, r"\(whole layers or biases beside it\) adapter"),
        ({f"{STEM}.lora_A.weight": (2, 4, 3, 3)}, "has no up matrix for unet.conv_in"),
        ({f"{STEM}.lora_B.weight": (32, 2)}, "has no down matrix for unet.conv_in"),
        (
            {f"{STEM}.lora_A.weight": (2, 4, 1, 1), f"{STEM}.lora_B.weight": (32, 2, 1, 1)},
            r"for unet.conv_in it has matrices of shapes \[2, 4, 1, 1\] and \[32, 2, 1, 1\], the model a weight of "
            r"\[32, 4, 3, 3\]",
        ),
        ({f"{STEM}.lora_A.weight": (2, 4, 3, 3), f"{STEM}.lora_B.weight": (32, 3, 1, 1)}, "does not fit this model"),
        ({f"{STEM}.lora_A.weight": (0, 4, 3, 3), f"{STEM}.lora_B.weight": (32, 0, 1, 1)}, "does not fit this model"),
        ({f"{STEM}.lora_A.weight": (), f"{STEM}.lora_B.weight": (32,)}, "does not fit this model"),
        (
            {
                f"{s}.lora_{d}.weight": x
                for s in (STEM, "conv_in")
                for d, x in (("A", (2, 4, 3, 3)), ("B", (32, 2, 1, 1)))
            },
            "changes unet.conv_in twice",
        ),
        (
            {f"{STEM}.lora_A.weight": (2, 4, 3, 3), f"{STEM}.lora_B.weight": (32, 2, 1, 1), f"{STEM}.alpha": (2,)},
            "unet.conv_in.alpha must be one finite number",
        ),
        ({"lora_unet_conv_in.dora_scale": (32, 1, 1, 1)}, "has no down matrix for lora_unet_conv_in"),
        (
            {f"{STEM}.lora_A.weight": (2, 4, 3, 3), f"{STEM}.lora_B.weight": (32, 2), f"{STEM}.dora_scale": (5, 1)},
            r"has matrices of shapes \[2, 4, 3, 3\] and \[32, 2\] and \[5, 1\], the model a weight of",
        ),
        (
            {
                f"{STEM}.lora_down.weight": (2, 4, 1, 1),
                f"{STEM}.lora_up.weight": (32, 2),
                f"{STEM}.lora_mid.weight": (2, 3, 3, 3),
            },
            r"has matrices of shapes \[2, 4, 1, 1\] and \[2, 3, 3, 3\] and \[32, 2\], the model a weight of",
        ),
        ({"lora_unet_conv_in.set_weight": (32, 4, 3, 3)}, r"is a ComfyUI \(whole weights\) adapter"),
        (
            {"lora_unet_conv_in.on_input": (), "lora_unet_conv_in.weight": (32,)},
            r"scales 32 inputs of unet\.conv_in, which",
        ),
        ({"base_model.model.conv_in.ia3_l": (1, 4, 1, 1)}, r"needs the adapter_config\.json that peft wrote"),
        ({"lora_unet_conv_norm_out.w_norm": (31,)}, r"has matrices of shapes \[31\], the model a weight of \[32\]"),
        ({"lora_unet_conv_norm_out.w_norm": (32,), "lora_unet_conv_norm_out.b_norm": (1,)}, r"\[32\] and \[1\], the"),
        ({"lora_unet_conv_norm_out.w_norm": (32,), "lora_unet_conv_norm_out.scalar": ()}, "does not fit this model"),
        ({"lora_unet_conv_norm_out.lora_up.weight": (32, 2)}, "has no down matrix for lora_unet_conv_norm_out"),
        ({"lora_unet_conv_in.diff": (32,)}, r"of shapes \[32\], the model a weight of \[32, 4, 3, 3\]"),
        ({"lora_unet_conv_in.diff_b": (4,)}, r"of shapes \[4\], the model a weight of"),
        ({"lora_unet_conv_in.diff_b": (32,), "lora_unet_conv_in.dora_scale": (32, 1)}, "has no down matrix"),
        ({f"{STEM}.lora_B.bias": (32,)}, "has no down matrix for unet.conv_in"),
        (
            {
                f"{STEM}.lora_A.weight": (2, 4, 3, 3),
                f"{STEM}.lora_B.weight": (32, 2),
                f"{STEM}.lora_B.bias": (32,),
                f"{STEM}.diff_b": (32,),
            },
            "changes the bias of unet.conv_in in several ways",
        ),
        (
            {"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.diff_b": (64,)},
            r"it changes the bias of unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q, which has none",
        ),
        ({"lora_unet_conv_in.lora_up.weight": (32, 2), "lora_unet_conv_in.scalar": ()}, "has no down matrix"),
        ({f"lora_unet_conv_in.{x}.weight": (2, 2) for x in ("a1", "a2", "b1", "b2")}, "the model a weight of"),
        ({"lora_unet_conv_in.am.weight": (2, 2)}, r"is a GLoRA \(with three matrices over the inputs\) adapter"),
        ({"lora_unet_conv_in.oft_blocks": (2, 2, 2)}, r"has matrices of shapes \[2, 2, 2\], the model a weight of"),
        ({"lora_unet_conv_in.oft_diag": (2, 2, 2)}, r"is an OFT \(early, or of embeddings\) adapter"),
        ({"base_model.model.conv_in.boft_R": (2, 2)}, "has no boft_s matrix"),
        ({"base_model.model.conv_in.glora_A.Xd": (2, 2)}, r"is a peft \(other than LoRA\) adapter"),
        ({"base_model.model.conv_in.vera_lambda_b": (2,)}, "is a VeRA adapter"),
        ({"base_model.model.conv_in.lora_E": (2,)}, "is an AdaLoRA adapter"),
        ({"base_model.model.x.lora_embedding_A": (2, 2)}, r"is a LoRA \(table of embeddings\) adapter"),
        ({"base_model.model.x.modules_to_save.weight": (2, 2)}, r"is a LoRA \(whole modules beside it\) adapter"),
        (
            {f"{STEM}.lora_A.{name}.weight": (2, 4, 3, 3) for name in ("default_0", "default_1")},
            "holds several adapters, with unet.conv_in.lora_A.default_0.weight and",
        ),
        (
            {"0": (32, 2), "1": (2, 32), "2": (32, 2), "3": (2, 32)},
            "it lists 2 layers, which matches the attention layers of no part of this model",
        ),
        (
            {
                "lora_unet_input_blocks_8_1_transformer_blocks_9_attn2_to_k.lora_down.weight": (4, 2048),
                "lora_unet_input_blocks_8_1_transformer_blocks_9_attn2_to_k.lora_up.weight": (1280, 4),
            },
            "is a LoRA for SDXL, this model is .*: it changes lora_unet_input_blocks_8_1.*, which the model does not",
        ),
        (
            {f"unet:{i}:{d}": x for i in range(9) for d, x in (("down", (1, 768)), ("up", (320, 1)))},
            "is a LoRA for Stable Diffusion 1.x, .* it lists 9 layers",
        ),
    ],
)
def test_files_that_do_not_fit(tensors, message, sd1, tmp_path):
    file = tmp_path / "bad.safetensors"
    save_file({name: np.ones(shape, np.float32) for name, shape in tensors.items()}, file)
    with pytest.raises(WeightsError, match=message) as error:
        read_lora(sd1[0], file)
    assert str(error.value).startswith(str(file))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("metadata", ["{", "[]", '{"unet.lora_alpha": "x"}', '{"unet.alpha_pattern": 3}'])
def test_damaged_metadata(metadata, sd1, tmp_path):
    found = matrices(sd1[1], "attn1.to_q")
    file = written(tmp_path / "bad.safetensors", peft, found, {"lora_adapter_metadata": metadata})
    with pytest.raises(WeightsError, match=r"bad\.safetensors has damaged metadata"):
        read_lora(sd1[0], file)
    written(file, peft, found, {"lora_adapter_metadata": json.dumps({"unet.use_dora": True})})
    with pytest.raises(WeightsError, match="is a DoRA but lacks the magnitude of unet"):
        read_lora(sd1[0], file)


def test_arguments_that_do_not_fit(fresh, sd1, tmp_path):
    params, lora = fresh
    with pytest.raises(WeightsError, match="2 LoRAs have 1 scales"):
        merge_lora(params, [lora, lora], [1.0])
    with pytest.raises(WeightsError, match=r"changes unet\.nowhere, which the model does not have"):
        merge_lora(params, {"unet.nowhere": next(iter(lora.values()))})
    with pytest.raises(WeightsError, match=r"changes unet\.nowhere, which the model does not have"):
        save_lora(tmp_path / "x.safetensors", sd1[0], {"unet.nowhere": next(iter(lora.values()))})
    with pytest.raises(WeightsError, match="layout 'other' is unknown; known are diffusers, kohya"):
        save_lora(tmp_path / "x.safetensors", sd1[0], lora, "other")
    with pytest.raises(WeightsError, match=r"none/x\.safetensors cannot be written"):
        save_lora(tmp_path / "none" / "x.safetensors", sd1[0], {})
    with pytest.raises(WeightsError, match=r"x\.safetensors does not exist"):
        read_lora(sd1[0], tmp_path / "x.safetensors")
