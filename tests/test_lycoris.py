"""LoHa, LoKr and whole differences: against peft, and as LyCORIS names them."""

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxdiff.errors import WeightsError
from jaxdiff.io.lora import Difference, read_lora, save_lora
from jaxdiff.io.torch_names import tensor_name, to_torch_layout
from tests.support import networks
from tests.support.lora_files import drawn_params, merge, small_model


@pytest.fixture(scope="module")
def sd1():
    model = small_model()
    return model, drawn_params(model)


def merged_weights(params, lora) -> dict[str, np.ndarray]:
    """The UNet's weights that a LoRA changes, as they become, by name and in layout of PyTorch."""
    before = jax.tree_util.tree_leaves_with_path(params["unet"])
    after = jax.tree.leaves(merge(params, lora)["unet"])
    found = {}
    for (path, x), y in zip(before, after, strict=True):
        if not np.array_equal(x, y):
            names = tuple(key.key for key in path)
            found[tensor_name(names)] = to_torch_layout(names, np.asarray(y))
    return found


# --- peft's


PEFT = {
    "LoHa": ("LoHaConfig", {}),
    "LoHa, convolutions of three": ("LoHaConfig", {"use_effective_conv2d": True}),
    "LoHa, alpha by layer": ("LoHaConfig", {"alpha_pattern": {"conv1": 9.0}, "rank_pattern": {"to_q": 2}}),
    "LoKr": ("LoKrConfig", {}),
    "LoKr, both divided": ("LoKrConfig", {"decompose_both": True, "r": 2}),
    "LoKr, convolutions of three": ("LoKrConfig", {"use_effective_conv2d": True, "r": 2}),
    "LoKr, whole": ("LoKrConfig", {"r": 64}),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # peft's own
@pytest.mark.parametrize("case", PEFT)
def test_equals_peft(case, sd1, tmp_path):
    torch, library = pytest.importorskip("torch"), pytest.importorskip("peft")
    from tests.support import oracle

    kind, settings = PEFT[case]
    targets = ["to_q", "proj_in", "conv1", "conv_shortcut"]  # dense ones, and convolutions of 3x3 and 1x1
    config = getattr(library, kind)(**{"r": 4, "alpha": 3.0, "target_modules": targets, **settings})
    theirs = library.get_peft_model(oracle.unet("sd1"), config)
    with torch.no_grad():
        for name, x in theirs.named_parameters():
            if "hada" in name or "lokr" in name:
                x.copy_(torch.from_numpy(0.5 * networks.draw(name, tuple(x.shape))))
    theirs.save_pretrained(tmp_path)
    lora = read_lora(sd1[0], tmp_path)
    assert {type(f) for f in lora.values()} == {Difference}
    expected = {name: x.detach().numpy() for name, x in theirs.merge_and_unload().named_parameters()}
    found = merged_weights(sd1[1], lora)
    assert len(found) == len(lora) > 20
    for name, x in found.items():
        # A sum of at most 9 * 64 products of numbers below 1, each rounded at 6e-8, in any order.
        np.testing.assert_allclose(x, expected[name], rtol=1e-5, atol=1e-5, err_msg=name)


# --- LyCORIS'


def drawn(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def three(t: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Equation (3) of jaxdiff/io/lycoris.py, by matrix products."""
    return np.stack([np.stack([a.T @ t[:, :, y, x] @ b for x in range(t.shape[3])], -1) for y in range(t.shape[2])], -2)


DENSE, CONV = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v", "mid_block.resnets.0.conv1"


def forms(out: int, inputs: int):
    """name -> (layer, tensors by role, what the kernel changes by at full strength)."""
    a, b, c, d = drawn(0, out, 3), drawn(1, 3, inputs), drawn(2, out, 3), drawn(3, 3, inputs)
    wide, t = inputs * 9, drawn(4, 3, 3, 3, 3)
    e, f = drawn(5, 3, wide), drawn(6, 3, wide)
    product = {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d}
    small, large, small_a, small_b = drawn(7, 4, 2), drawn(8, out // 4, inputs // 2), drawn(9, 4, 2), drawn(10, 2, 2)
    large_a, large_b = drawn(11, out // 4, 2), drawn(12, 2, inputs // 2)
    core = drawn(13, out // 4, inputs // 2, 3, 3)
    return {
        "LoHa": (DENSE, {**product, "alpha": np.array(6, np.float32)}, 2 * (a @ b) * (c @ d)),
        "LoHa without an alpha": (DENSE, product, (a @ b) * (c @ d)),
        "LoHa of a convolution": (CONV, {**product, "hada_w1_b": e, "hada_w2_b": f}, (a @ e) * (c @ f)),
        "LoHa of three": (
            CONV,
            {"hada_t1": t, "hada_w1_a": a.T, "hada_w1_b": b, "hada_t2": t[::-1].copy(), "hada_w2_a": c.T,
             "hada_w2_b": d, "alpha": np.array(1.5, np.float32)},
            0.5 * three(t, a.T, b) * three(t[::-1], c.T, d),
        ),
        "LoKr, whole": (
            DENSE, {"lokr_w1": small, "lokr_w2": large, "alpha": np.array(1e10, np.float32)}, np.kron(small, large),
        ),
        "LoKr": (
            DENSE, {"lokr_w1": small, "lokr_w2_a": large_a, "lokr_w2_b": large_b, "alpha": np.array(1, np.float32)},
            0.5 * np.kron(small, large_a @ large_b),
        ),
        "LoKr, both divided": (
            DENSE, {"lokr_w1_a": small_a, "lokr_w1_b": small_b, "lokr_w2_a": large_a, "lokr_w2_b": large_b},
            np.kron(small_a @ small_b, large_a @ large_b),
        ),
        "LoKr of a convolution": (CONV, {"lokr_w1": small, "lokr_w2": core}, np.kron(small[:, :, None, None], core)),
        "LoKr, scaled": (
            DENSE, {"lokr_w1": small, "lokr_w2": large, "scalar": np.array(0.25, np.float32)},
            np.kron(small, large) / 4,
        ),
        "a difference": (CONV, {"diff": drawn(14, out, inputs, 3, 3)}, drawn(14, out, inputs, 3, 3)),
        "a scaled LoRA": (
            DENSE,
            {"lora_up.weight": a, "lora_down.weight": b, "alpha": np.array(6, np.float32),
             "scalar": np.array([0.25], np.float32)},
            0.5 * a @ b,
        ),
    }  # fmt: skip


FORMS = forms(4, 4)


def write(file, stem: str, tensors: dict) -> None:
    save_file({f"{stem}.{role}": np.array(x, order="C") for role, x in tensors.items()}, file)


def case(sd1, name: str) -> tuple[str, dict, np.ndarray, np.ndarray]:
    """A layer, its tensors, its weight in PyTorch's layout, and what it changes by."""
    layer = FORMS[name][0]
    weights = {
        tensor_name(names): to_torch_layout(names, np.asarray(x))
        for path, x in jax.tree_util.tree_leaves_with_path(sd1[1]["unet"])
        for names in [tuple(key.key for key in path)]
    }
    before = weights[f"{layer}.weight"]
    _, tensors, change = forms(*before.shape[:2])[name]
    return layer, tensors, before, change.reshape(before.shape)


@pytest.mark.parametrize("prefix", ["lora_unet_", "lycoris_"])
@pytest.mark.parametrize("name", FORMS)
def test_every_form_changes_what_its_formula_says(name, prefix, sd1, tmp_path):
    model, params = sd1
    layer, tensors, before, change = case(sd1, name)
    stem, file = prefix + layer.replace(".", "_"), tmp_path / "a.safetensors"
    write(file, stem, tensors)
    lora = read_lora(model, file)
    found = merged_weights(params, lora)
    assert found.keys() == {f"{layer}.weight"}
    most = np.abs(change).max()
    np.testing.assert_allclose(found[f"{layer}.weight"], before + change, rtol=1e-5, atol=1e-5 * most)
    save_lora(tmp_path / "again.safetensors", model, lora, "kohya")
    again = merged_weights(params, read_lora(model, tmp_path / "again.safetensors"))
    np.testing.assert_allclose(again[f"{layer}.weight"], found[f"{layer}.weight"], rtol=1e-6, atol=1e-6 * most)
    if "lora_up.weight" not in tensors:
        with pytest.raises(WeightsError, match="the layout diffusers has no place for what changes unet"):
            save_lora(tmp_path / "c.safetensors", model, lora)


def test_a_magnitude_makes_it_a_dora(sd1, tmp_path):
    model, params = sd1
    layer, tensors, before, change = case(sd1, "LoKr")
    size, file = 1 + np.abs(drawn(20, len(before), 1)), tmp_path / "a.safetensors"
    write(file, f"lora_unet_{layer.replace('.', '_')}", {**tensors, "dora_scale": size})
    found = merged_weights(params, read_lora(model, file))[f"{layer}.weight"]
    changed = before + change
    expected = size * changed / np.linalg.norm(changed, axis=1, keepdims=True)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "without", "changed", "message"),
    [
        ("LoHa", "hada_w2_b", {}, "has no hada_w2_b matrix for lora_unet_mid_block"),
        ("LoHa of three", "hada_t2", {}, "has no hada_t2 matrix"),
        ("LoKr", "lokr_w1", {}, "has no lokr_w1 matrix"),
        ("LoKr", "lokr_w2_a", {}, "has no lokr_w2_a matrix"),
        ("LoKr", "", {"lokr_w1": drawn(0, 3, 2)}, r"matrices of shapes \[3, 2\] and .*, the model a weight of"),
        ("LoHa", "", {"hada_w1_b": drawn(0, 2, 5)}, "the model a weight of"),
        ("a difference", "", {"diff": drawn(0, 3, 3)}, r"matrices of shapes \[3, 3\], the model a weight of"),
        ("LoKr", "", {"diff": drawn(0, 3, 3)}, "in several ways, LoKr and a difference: keep one"),
        ("LoHa", "", {"lora_up.weight": drawn(0, 3, 3)}, "in several ways, LoHa and LoRA: keep one"),
        ("LoHa", "", {f"hada_w{i}": np.zeros(0, np.float32) for i in ("1_b", "2_b")}, "the model a weight of"),
        ("LoKr", "", {"alpha": np.array(np.nan, np.float32)}, "alpha must be one finite number"),
        ("a scaled LoRA", "", {"scalar": np.array(np.inf, np.float32)}, "scalar must be one finite number"),
    ],
)
def test_what_does_not_fit_is_said(name, without, changed, message, sd1, tmp_path):
    layer, tensors, *_ = case(sd1, name)
    stem, file = f"lora_unet_{layer.replace('.', '_')}", tmp_path / "a.safetensors"
    write(file, stem, {role: x for role, x in {**tensors, **changed}.items() if role != without})
    with pytest.raises(WeightsError, match=message):
        read_lora(sd1[0], file)
