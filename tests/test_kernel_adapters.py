"""Adapters whose change depends on the kernel (OFT, BOFT, GLoRA, (IA)³): as LyCORIS merges them, and against peft.

The formulas below are LyCORIS' (4.1.3, `make_weight` of its modules) in NumPy; they were compared with LyCORIS itself.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file, save_file

from jaxdiff.errors import WeightsError
from jaxdiff.io.lora import Difference, Factors, merge_lora, read_lora, save_lora
from jaxdiff.io.lora_layers import layers
from jaxdiff.io.torch_names import to_torch_layout
from tests.support import networks
from tests.support.lora_files import drawn_params, merge, small_model
from tests.test_lycoris import drawn, merged_weights

DENSE, CONV = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v", "mid_block.resnets.0.conv1"
POINT, TEXT = "mid_block.attentions.0.proj_in", "encoder.layers.0.mlp.fc1"


@pytest.fixture(scope="module")
def sd1():
    model = small_model()
    return model, drawn_params(model)


def weight_of(params, name: str, module: str = "unet") -> np.ndarray:
    """In PyTorch's layout."""
    x = params
    for key in next(layer.path for layer in layers(params) if layer.name == f"{module}.{name}"):
        x = x[key]
    return to_torch_layout(("kernel",), np.asarray(x))


def kernel_of(params, name: str):
    """A function of LoRAs and scales: what a layer of the UNet becomes, in PyTorch's layout."""
    path = next(layer.path for layer in layers(params) if layer.name == f"unet.{name}")
    alone = unflatten_dict({path: flatten_dict(params)[path]})

    @jax.jit
    def kernel(loras, scales):
        return jnp.moveaxis(flatten_dict(merge_lora(alone, loras, scales))[path], (-1, -2), (0, 1))

    return kernel


# --- LyCORIS'


def rotations(blocks, most: float = 0.0):
    q = blocks - np.swapaxes(blocks, -1, -2)
    size = np.linalg.norm(q) + 1e-8
    q = q * (most / size) if 0 < most < size else q
    eye = np.eye(q.shape[-1])
    return (eye + q) @ np.linalg.inv(eye - q)


def oft(w, s, blocks, rescale=1.0, alpha=0.0):
    count, b, _ = blocks.shape
    r = s * rotations(blocks, alpha * len(w)) + (1 - s) * np.eye(b)
    return rescale * np.einsum("knm,kn...->km...", r, w.reshape(count, b, *w.shape[1:])).reshape(w.shape)


def boft(w, s, blocks, rescale=1.0, alpha=0.0):
    b, found = blocks.shape[-1], w
    for i, r in enumerate(rotations(blocks, alpha * len(w))):
        half = 2**i * b // 2
        # (c g k) -> (c k g), whose blocks of b rows are multiplied.
        order = np.arange(len(w)).reshape(-1, 2, half).swapaxes(1, 2).reshape(-1)
        turned = np.einsum("bij,bj...->bi...", s * r + (1 - s) * np.eye(b), found[order].reshape(-1, b, *w.shape[1:]))
        found = np.empty_like(found)
        found[order] = turned.reshape(w.shape)
    return found * rescale


def glora(w, s, a1, a2, b1, b2, scale=1.0):
    flat = w.reshape(*w.shape[:2], -1)
    through = np.stack([flat[..., i] @ a1 @ a2 for i in range(flat.shape[-1])], -1).reshape(w.shape)
    return w + s * scale * (through + (b1 @ b2).reshape(w.shape))


def scalar(x) -> np.ndarray:
    return np.array(x, np.float32)


def forms(w: np.ndarray, point: np.ndarray, conv: np.ndarray):
    """name -> (layer, tensors by ending, the weight at a scale)."""
    out, inputs = w.shape
    blocks, wide = 0.2 * drawn(0, out // 4, 4, 4), 0.2 * drawn(1, len(conv) // 8, 8, 8)
    size, sizes = 1 + 0.3 * drawn(2, out, 1), 1 + 0.3 * drawn(3, len(conv), 1, 1, 1)
    stages, large = 0.2 * drawn(4, 3, out // 4, 4, 4), 0.2 * drawn(5, 2, len(conv) // 8, 8, 8)
    a1, a2, b1, b2 = (0.2 * drawn(6 + i, *x) for i, x in enumerate([(inputs, 3), (3, inputs), (out, 3), (3, inputs)]))
    n, m = conv.shape[:2]
    c1, c2, d1, d2, mid, d3 = (
        0.2 * drawn(10 + i, *x) for i, x in enumerate([(m, 3), (3, m), (n, 3), (3, m), (3, 3, 3, 3), (3, m, 3, 3)])
    )
    ones = (1, 1)
    three = np.einsum("im,mnhw,nj->ijhw", d1, mid, d2)
    through = glora(conv, 1.0, c1, c2, np.zeros((n, 3)), np.zeros((3, m * 9))) - conv
    by_out, by_in = drawn(20, out), drawn(21, inputs)
    conv_out, conv_in = drawn(22, n), drawn(23, m)
    on, off = np.array(1), np.array(0)
    return {
        "OFT": (DENSE, {"oft_blocks": blocks, "alpha": scalar(0)}, lambda s: oft(w, s, blocks)),
        "OFT, held": (
            DENSE, {"oft_blocks": blocks, "alpha": scalar(0.01)}, lambda s: oft(w, s, blocks, alpha=0.01)
        ),
        "OFT, rescaled": (
            DENSE, {"oft_blocks": blocks, "rescale": size, "alpha": scalar(10)}, lambda s: oft(w, s, blocks, size)
        ),
        "OFT of a convolution": (
            CONV, {"oft_blocks": wide, "rescale": sizes, "alpha": scalar(0.03)},
            lambda s: oft(conv, s, wide, sizes, 0.03),
        ),
        "OFT of a point": (POINT, {"oft_blocks": blocks}, lambda s: oft(point, s, blocks)),
        "BOFT": (DENSE, {"oft_blocks": stages, "alpha": scalar(0)}, lambda s: boft(w, s, stages)),
        "BOFT of a convolution": (
            CONV, {"oft_blocks": large, "rescale": sizes, "alpha": scalar(0.03)},
            lambda s: boft(conv, s, large, sizes, 0.03),
        ),
        "GLoRA": (
            DENSE, {"a1.weight": a1, "a2.weight": a2, "b1.weight": b1, "b2.weight": b2, "alpha": scalar(6)},
            lambda s: glora(w, s, a1, a2, b1, b2, 2.0),
        ),
        "the first GLoRA": (
            DENSE, {"a1.weight": a2, "a2.weight": a1, "b1.weight": b2, "b2.weight": b1},
            lambda s: glora(w, s, a1, a2, b1, b2),
        ),
        "GLoRA of a convolution": (
            CONV, {"a1.weight": c1.reshape(m, 3, *ones), "a2.weight": c2.reshape(3, m, *ones),
                   "b1.weight": d1.reshape(n, 3, *ones), "b2.weight": d3, "alpha": scalar(1.5)},
            lambda s: glora(conv, s, c1, c2, d1, d3.reshape(3, -1), 0.5),
        ),
        "GLoRA of three": (
            CONV, {"a1.weight": c1.reshape(m, 3, *ones), "a2.weight": c2.reshape(3, m, *ones),
                   "b1.weight": d1.reshape(n, 3, *ones), "b2.weight": d2.reshape(3, m, *ones), "bm.weight": mid},
            lambda s: conv + s * (through + three),
        ),
        "(IA)³ of outputs": (DENSE, {"weight": by_out, "on_input": off}, lambda s: w * (1 + s * by_out[:, None])),
        "(IA)³ of inputs": (DENSE, {"weight": by_in, "on_input": on}, lambda s: w * (1 + s * by_in)),
        "(IA)³ of a convolution's outputs": (
            CONV, {"weight": conv_out.reshape(1, -1, *ones), "on_input": off},
            lambda s: conv * (1 + s * conv_out[:, None, None, None]),
        ),
        "(IA)³ of a convolution's inputs": (
            CONV, {"weight": conv_in.reshape(1, -1, *ones), "on_input": on},
            lambda s: conv * (1 + s * conv_in[:, None, None]),
        ),
    }  # fmt: skip


NAMES = tuple(forms(np.ones((64, 24)), np.ones((64, 64, 1, 1)), np.ones((64, 64, 3, 3))))


def case(sd1, name: str):
    return forms(*(weight_of(sd1[1], layer).astype(np.float64) for layer in (DENSE, POINT, CONV)))[name]


def write(file, layer: str, tensors: dict, prefix: str = "lora_unet_") -> None:
    stem = prefix + layer.replace(".", "_")
    save_file({f"{stem}.{ending}": np.array(x, order="C") for ending, x in tensors.items()}, file)


def close(found, expected) -> None:
    # At most 64 * 9 products of numbers below about 10, each rounded at 6e-8, through at most three rotations.
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", NAMES)
def test_every_kind_merges_as_lycoris_does(name, sd1, tmp_path):
    model, params = sd1
    layer, tensors, expected = case(sd1, name)
    assert np.abs(expected(1.0) - expected(0.5)).max() > 0.05
    file, again = tmp_path / "a.safetensors", tmp_path / "again.safetensors"
    write(file, layer, tensors)
    lora = read_lora(model, file)
    assert {type(f) for f in lora.values()} == {Difference}
    save_lora(again, model, lora, "kohya")
    if "first" not in name:
        ours, theirs = load_file(again), load_file(file)
        for key, x in theirs.items():
            np.testing.assert_array_equal(ours[key], x, err_msg=key)
            assert ours[key].shape == x.shape
    assert lora.keys() == {f"unet.{layer}"}
    kernel = kernel_of(params, layer)
    for scale in (1.0, 0.5, -0.25):
        close(kernel([lora], [scale]), expected(scale))
    close(kernel([read_lora(model, again)], [1.0]), expected(1.0))
    np.testing.assert_allclose(kernel([lora], [0.0]), weight_of(params, layer), rtol=1e-6, atol=1e-6)
    with pytest.raises(WeightsError, match=r"the layout diffusers has no place for what .*: take layout='kohya'"):
        save_lora(tmp_path / "c.safetensors", model, lora)


def test_names_and_kinds_within_one_file(sd1, tmp_path):
    model, params = sd1
    other = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    layer, tensors, expected = case(sd1, "OFT")
    fc1, plain = weight_of(params, TEXT, "text_encoder"), weight_of(params, other)
    blocks, down, up = 0.2 * drawn(30, len(fc1) // 8, 8, 8), drawn(31, 2, plain.shape[1]), drawn(32, len(plain), 2)
    mixed = {
        **{f"oft_unet_{layer.replace('.', '_')}.{ending}": x for ending, x in tensors.items()},
        f"lora_te_text_model_{TEXT.replace('.', '_')}.oft_blocks": blocks,
        f"lora_unet_{other.replace('.', '_')}.lora_down.weight": down,
        f"lora_unet_{other.replace('.', '_')}.lora_up.weight": up,
    }
    save_file(mixed, tmp_path / "a.safetensors")
    lora = read_lora(model, tmp_path / "a.safetensors")
    assert {type(f) for f in lora.values()} == {Difference, Factors}
    found = merged_weights(params, lora)
    close(found[f"{layer}.weight"], expected(1.0))
    close(found[f"{other}.weight"], plain + up @ down)
    text = weight_of(merge(params, lora), TEXT, "text_encoder")
    close(text, oft(fc1.astype(np.float64), 1.0, blocks))


def test_scales_have_gradients_and_loras_add(sd1, tmp_path):
    model, params = sd1
    layer, tensors, expected = case(sd1, "BOFT")
    write(tmp_path / "a.safetensors", layer, tensors)
    lora = read_lora(model, tmp_path / "a.safetensors")
    w, scales = expected(0.0), np.array([0.5, 1.0], np.float32)
    kernel = kernel_of(params, layer)
    close(kernel([lora, lora], list(scales)), expected(0.5) + expected(1.0) - w)
    slope = jax.grad(lambda s: kernel([lora, lora], [s[0], s[1]]).sum())(scales)
    for i, scale in enumerate(scales):
        step = (expected(scale + 1e-4).sum() - expected(scale - 1e-4).sum()) / 2e-4
        np.testing.assert_allclose(slope[i], step, rtol=1e-3, atol=1e-3)
    still = Difference({"oft_blocks": np.zeros((len(w) // 4, 4, 4), np.float32), "alpha": scalar(0.1)}, 1.0)
    slopes = jax.grad(lambda f: kernel([{f"unet.{layer}": f}], [1.0]).sum())(still)
    assert np.isfinite(slopes.parts["oft_blocks"]).all()
    assert np.abs(slopes.parts["oft_blocks"]).max() > 0


@pytest.mark.parametrize(
    ("name", "without", "changed", "message"),
    [
        ("OFT, rescaled", "oft_blocks", {}, "has no oft_blocks matrix for lora_unet_mid_block"),
        ("OFT", "", {"alpha": scalar(np.nan)}, "alpha must be one finite number"),
        ("OFT", "", {"alpha": scalar(np.inf)}, "alpha must be one finite number"),
        ("BOFT", "", {"alpha": scalar([1, 2])}, "alpha must be one finite number|the model a weight of"),
        ("OFT", "", {"oft_blocks": drawn(0, 5, 4, 4)}, r"matrices of shapes \[5, 4, 4\], the model a weight of"),
        ("OFT", "", {"oft_blocks": drawn(0, 16, 4, 1)}, "the model a weight of"),
        ("OFT", "", {"oft_blocks": drawn(0, 4, 4)}, "the model a weight of"),
        ("OFT", "", {"rescale": drawn(0, 1, 1)}, "the model a weight of"),
        ("OFT", "", {"dora_scale": drawn(0, 64, 1)}, "in several ways, DoRA and OFT: keep one"),
        ("OFT", "", {"scalar": scalar(1)}, "in several ways, OFT and a scalar: keep one"),
        ("OFT", "", {"diff": drawn(0, 64, 24)}, "in several ways, OFT and a difference: keep one"),
        ("OFT", "", {"oft_R.weight": drawn(0, 6, 6)}, "in several ways, OFT and OFT of peft: keep one"),
        ("BOFT", "", {"oft_blocks": drawn(0, 0, 16, 4, 4)}, "the model a weight of"),
        ("BOFT", "", {"oft_blocks": drawn(0, 9, 16, 4, 4)}, "the model a weight of"),
        ("BOFT", "", {"oft_blocks": drawn(0, 2, 64, 1, 1)}, "the model a weight of"),
        ("GLoRA", "b2.weight", {}, "has no b2 matrix"),
        ("GLoRA", "", {"a1.weight": drawn(0, 3)}, "the model a weight of"),
        ("GLoRA", "", {"b1.weight": drawn(0, 63, 3)}, "the model a weight of"),
        ("GLoRA", "", {"bm.weight": drawn(0, 3, 3, 3, 3)}, "the model a weight of"),
        ("GLoRA", "", {"am.weight": drawn(0, 3, 3)}, r"is a GLoRA \(with three matrices over the inputs\) adapter"),
        ("GLoRA", "", {"alpha": scalar(np.nan)}, "alpha must be one finite number"),
        ("GLoRA", "", {"lora_up.weight": drawn(0, 64, 3)}, "in several ways, GLoRA and LoRA: keep one"),
        ("(IA)³ of inputs", "weight", {}, "has no ia3_weight matrix"),
        ("(IA)³ of inputs", "on_input", {}, "is not part of a LoRA"),
        ("(IA)³ of inputs", "", {"weight": drawn(0, 5)}, "the model a weight of"),
        ("(IA)³ of inputs", "", {"weight": drawn(0, 64)}, "scales 64 inputs of unet.mid_block.*, which has 24"),
        ("(IA)³ of inputs", "", {"on_input": scalar(np.nan)}, "on_input must be one finite number"),
    ],
)
def test_what_does_not_fit_is_said(name, without, changed, message, sd1, tmp_path):
    layer, tensors, _ = case(sd1, name)
    file = tmp_path / "a.safetensors"
    write(file, layer, {ending: x for ending, x in {**tensors, **changed}.items() if ending != without})
    with pytest.raises(WeightsError, match=message) as error:
        read_lora(sd1[0], file)
    assert str(error.value).startswith(str(file))
    assert "\n" not in str(error.value)


# --- peft's

MODULES = [DENSE, POINT, "mid_block.attentions.0.transformer_blocks.0.ff.net.2"]  # dense with and without bias
PEFT = {
    "OFT": ("OFTConfig", {"oft_block_size": 8}, MODULES),
    "OFT, a longer series": ("OFTConfig", {"oft_block_size": 8, "num_cayley_neumann_terms": 7}, MODULES),
    "OFT, a series of three": ("OFTConfig", {"oft_block_size": 8, "num_cayley_neumann_terms": 3}, MODULES),
    "OFT, exact": ("OFTConfig", {"oft_block_size": 0, "r": 4, "use_cayley_neumann": False}, MODULES),
    "OFT, held": ("OFTConfig", {"oft_block_size": 8, "coft": True, "eps": 0.5}, MODULES),
    "OFT, one block for all": ("OFTConfig", {"oft_block_size": 8, "block_share": True, "coft": True}, MODULES),
    "BOFT": ("BOFTConfig", {"boft_block_size": 4}, [*MODULES, CONV]),
    "BOFT of two factors": ("BOFTConfig", {"boft_block_size": 4, "boft_n_butterfly_factor": 2}, [DENSE, CONV]),
    "(IA)³": ("IA3Config", {"feedforward_modules": [MODULES[2]]}, [*MODULES, CONV]),
    "(IA)³ of inputs": ("IA3Config", {"feedforward_modules": r"mid.*(conv1|proj_in|net\.2)"}, [*MODULES, CONV]),
}


def saved(library, network, name: str, folder, monkeypatch):
    """A folder of peft's with drawn numbers -> its weights as peft merges them."""
    import torch

    kind, settings, targets = PEFT[name]
    if "factors" in name:  # which peft multiplies on CUDA alone
        from peft.tuners.boft import layer

        diagonal = lambda x: torch.stack([torch.block_diag(*blocks) for blocks in x])  # noqa: E731
        monkeypatch.setattr(layer, "get_fbd_cuda", lambda: True)
        monkeypatch.setattr(layer.FastBlockDiag, "apply", staticmethod(diagonal))
    theirs = library.get_peft_model(network, getattr(library, kind)(target_modules=targets, **settings))
    with torch.no_grad():
        for key, x in theirs.named_parameters():
            if "oft_" in key or "ia3_" in key:
                x.copy_(torch.from_numpy(("_s." in key or "ia3" in key) + 0.3 * networks.draw(key, tuple(x.shape))))
    theirs.save_pretrained(folder)
    return {key: x.detach().numpy() for key, x in theirs.merge_and_unload().named_parameters()}


@pytest.mark.filterwarnings("ignore")  # peft's own
@pytest.mark.parametrize("name", PEFT)
def test_equals_peft(name, sd1, tmp_path, monkeypatch):
    pytest.importorskip("torch")
    library = pytest.importorskip("peft")
    from tests.support import oracle

    expected = saved(library, oracle.unet("sd1"), name, tmp_path, monkeypatch)
    lora = read_lora(sd1[0], tmp_path)
    found = merged_weights(sd1[1], lora)
    biases = {"(IA)³": 2, "(IA)³ of inputs": 0}.get(name, 0)
    assert len(found) == len(lora) == len(PEFT[name][2]) + biases
    assert sum(key.endswith("bias") for key in found) == biases
    for key, x in found.items():
        close(x, expected[key])
    file = tmp_path / "b.safetensors"
    if name == "(IA)³ of inputs":
        save_lora(file, sd1[0], lora, "kohya")
        again = merged_weights(sd1[1], read_lora(sd1[0], file))
        for key, x in found.items():
            np.testing.assert_array_equal(again[key], x)
    else:
        with pytest.raises(WeightsError, match=r"the layout kohya has no place for what changes unet\.mid_block"):
            save_lora(file, sd1[0], lora, "kohya")


@pytest.mark.filterwarnings("ignore")  # peft's own
def test_damaged_adapters_of_peft(sd1, tmp_path, monkeypatch):
    pytest.importorskip("torch")
    library = pytest.importorskip("peft")
    from tests.support import oracle

    saved(library, oracle.unet("sd1"), "OFT", tmp_path, monkeypatch)
    settings, file = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    good = json.loads(settings.read_text())
    for changed in (
        {"block_share": True},
        {"num_cayley_neumann_terms": 10**9},
        {"num_cayley_neumann_terms": "x"},
        {"coft": True, "eps": float("nan")},
        {"coft": True, "eps": "x"},
    ):
        settings.write_text(json.dumps(good | changed))
        with pytest.raises(WeightsError, match=r"adapter_config\.json do not go together for unet\.mid_block"):
            read_lora(sd1[0], tmp_path)
    settings.unlink()
    with pytest.raises(WeightsError, match=r"needs the adapter_config\.json that peft wrote"):
        read_lora(sd1[0], tmp_path)
    settings.write_text(json.dumps(good))
    stem = f"base_model.model.{CONV}"
    for tensors, message in (
        ({f"{stem}.oft_R.weight": drawn(0, 72, 28)}, "convolutions larger than 1x1"),
        ({f"{stem}.oft_R.weight": drawn(0, 72, 27)}, "the model a weight of"),
        ({f"{stem}.oft_R.weight": drawn(0, 72)}, "the model a weight of"),
        ({f"{stem}.boft_R": drawn(0, 1, 144, 4, 4)}, "has no boft_s matrix"),
        ({f"{stem}.boft_R": drawn(0, 1, 143, 4, 4), f"{stem}.boft_s": drawn(1, 64, 1)}, "the model a weight of"),
        ({f"{stem}.boft_R": drawn(0, 1, 144, 4, 4), f"{stem}.boft_s": drawn(1, 5, 1)}, "the model a weight of"),
        ({f"{stem}.ia3_l": drawn(0, 1, 5, 1, 1)}, "the model a weight of"),
    ):
        save_file(tensors, file)
        with pytest.raises(WeightsError, match=message):
            read_lora(sd1[0], tmp_path)
    settings.write_text(json.dumps(good | {"feedforward_modules": 3}))
    save_file({f"{stem}.ia3_l": drawn(0, 1, 64, 1, 1)}, file)
    with pytest.raises(WeightsError, match="do not go together"):
        read_lora(sd1[0], tmp_path)


def test_the_series_of_oft_before_peft_018(sd1, tmp_path):
    """`_cayley_batch` of peft 0.17: I + 2 Q + 2 Q^2 + 2 Q^3 + 2 Q^4; adapters of then name no version."""
    config = {
        "peft_type": "OFT",
        "oft_block_size": 8,
        "r": 0,
        "use_cayley_neumann": True,
        "num_cayley_neumann_terms": 5,
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    w = weight_of(sd1[1], DENSE)
    x, q = 0.3 * drawn(0, w.shape[1] // 8, 28), np.zeros((w.shape[1] // 8, 8, 8))
    q[:, *np.triu_indices(8, 1)] = x
    q -= q.swapaxes(1, 2)
    r = np.eye(8) + 2 * (q + q @ q + q @ q @ q + q @ q @ q @ q)
    save_file({f"base_model.model.{DENSE}.oft_R.weight": x}, tmp_path / "adapter_model.safetensors")
    found = merged_weights(sd1[1], read_lora(sd1[0], tmp_path))[f"{DENSE}.weight"]
    close(found, np.einsum("okn,kmn->okm", w.reshape(len(w), -1, 8), r).reshape(w.shape))
