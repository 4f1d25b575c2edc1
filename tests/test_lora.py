"""LoRA: the names and layouts of the programs that write them, against PyTorch diffusers with peft, and the algebra."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save_file

from jaxdiff.config import CLIPTextConfig, UNetConfig
from jaxdiff.io.layouts import unet_table
from jaxdiff.io.lora import init_lora, load_lora, merge_lora, read_lora, save_lora
from jaxdiff.io.lora_names import layers, list_orders, spellings
from jaxdiff.io.weights import WeightsError, from_torch_layout, tensor_name, to_torch_layout
from jaxdiff.models.model import Model, apply, build, param_shapes
from tests import networks, tiny

# The small networks alone agree to 1e-5 (test_models); a merged weight is rounded once more, at 6e-8.
TOLERANCE = 1e-5
ATTENTION = r"attn[12]\.to_|self_attn"
EVERYWHERE = r"conv|to_|proj|ff|fc|linear|time_emb"


def small_model(unet: str = "sd1", text_2: str | None = None) -> Model:
    texts = [None if name is None else CLIPTextConfig.from_dict(networks.TEXTS[name]) for name in ("vit_l", text_2)]
    config = UNetConfig.from_dict(networks.UNETS[unet])
    return build(texts[0], config, tiny.VAE, tiny.tokenizer(), tiny.SCHEDULER, text_2=texts[1])


def drawn_params(model: Model):
    """The weights that `tests.oracle.drawn` gives to the PyTorch networks."""
    flat = {}
    for path, leaf in flatten_dict(param_shapes(model)).items():
        shape = to_torch_layout(path, np.broadcast_to(0, leaf.shape)).shape
        flat[path] = jnp.asarray(from_torch_layout(path, networks.draw(tensor_name(path[1:]), shape)))
    return unflatten_dict(flat)


@pytest.fixture(scope="module")
def sd1():
    model = small_model()
    return model, drawn_params(model)


@pytest.fixture(scope="module")
def sdxl():
    model = small_model("sdxl", "openclip")
    return model, drawn_params(model)


def relative(ours, reference) -> float:
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    assert ours.shape == reference.shape
    return float(np.linalg.norm(ours - reference) / np.linalg.norm(reference))


def matrices(params, pattern: str, seed: int = 0, rank: int = 3, only=("unet", "text_encoder", "text_encoder_2")):
    """Random (module, PyTorch name, down, up) in PyTorch's layout for the layers whose names match."""
    rng = np.random.default_rng(seed)
    found = []
    for layer in layers(params):
        if layer.module in only and re.search(pattern, layer.name):
            out, *rest = to_torch_layout(("kernel",), np.broadcast_to(0, layer.shape)).shape
            down = rng.standard_normal((rank, *rest)) / np.sqrt(np.prod(rest))
            up = rng.standard_normal((out, rank, *(1,) * (len(rest) - 1)))
            name = layer.name.removeprefix(f"{layer.module}.")
            found.append((layer.module, name, down.astype(np.float32), up.astype(np.float32)))
    return found


def full(module: str, name: str) -> str:
    return name if module == "unet" or name == "text_projection" else f"text_model.{name}"


def peft(module, name, down, up):
    stem = f"{module}.{full(module, name)}"
    return {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}


def older(module, name, down, up):
    part = "lora" if module == "unet" else "lora_linear_layer"
    stem = f"{module}.{full(module, name)}.{part}"
    return {f"{stem}.down.weight": down, f"{stem}.up.weight": up}


def processor(module, name, down, up):
    name = (
        name.replace(".attn1.", ".attn1.processor.")
        .replace(".attn2.", ".attn2.processor.")
        .replace("to_out.0", "to_out")
    )
    for text, unet in (("q_proj", "to_q"), ("k_proj", "to_k"), ("v_proj", "to_v"), ("out_proj", "to_out")):
        name = name.replace(text, unet)
    stem = f"{module}.{full(module, name)}_lora"
    return {f"{stem}.down.weight": down, f"{stem}.up.weight": up}


def kohya(module, name, down, up, double=False):
    prefix = {
        "unet": "lora_unet_",
        "text_encoder": "lora_te1_" if double else "lora_te_",
        "text_encoder_2": "lora_te2_",
    }
    stem = prefix[module] + full(module, name).replace(".", "_")
    # diffusers gives all attention, and all of a text encoder, the file's most frequent alpha; so these have that one.
    alpha = np.array(0.5 if "conv1" in name else 2.0, np.float32)
    return {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": alpha}


def written(path, writer, found, metadata=None):
    tensors = {}
    for parts in found:
        tensors |= writer(*parts)
    save_file(tensors, path, metadata=metadata)
    return path


CASES = {  # layout -> how it is written, and the layers that the layout can name
    "peft": (peft, EVERYWHERE),
    "older": (older, ATTENTION),
    "processor": (processor, ATTENTION),
    "kohya": (kohya, EVERYWHERE),
}


# ---- PyTorch's side


@pytest.fixture(scope="module")
def oracle():
    pytest.importorskip("torch")
    pytest.importorskip("peft")
    from tests import oracle

    return oracle


def pipeline(oracle, double: bool = False):
    """The small networks in a pipeline that loads LoRAs."""
    import diffusers

    parts = {
        "vae": None,
        "tokenizer": None,
        "scheduler": diffusers.DDIMScheduler(),
        "text_encoder": oracle.text("vit_l"),
    }
    if double:
        return diffusers.StableDiffusionXLPipeline(
            **parts, unet=oracle.unet("sdxl"), text_encoder_2=oracle.text("openclip"), tokenizer_2=None
        )
    return diffusers.StableDiffusionPipeline(
        **parts, unet=oracle.unet("sd1"), safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


def reference(oracle, pipe, files, mixtures):
    """Outputs of PyTorch's networks with these files loaded, for each mixture: scales of all the files, 0 for none."""
    for i, file in enumerate(files):
        pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=f"lora{i}")
    found = []
    for scales in mixtures:
        used = [i for i, scale in enumerate(scales) if scale]
        pipe.set_adapters([f"lora{i}" for i in used], [scales[i] for i in used])
        found.append(torch_outputs(oracle, pipe))
    return found


def torch_outputs(oracle, pipe):
    double = hasattr(pipe, "text_encoder_2")
    inputs = networks.unet_inputs(networks.UNETS["sdxl" if double else "sd1"])
    outputs = {"unet": oracle.run_unet(pipe.unet, inputs)["output"]}
    for name in ("text_encoder", "text_encoder_2") if double else ("text_encoder",):
        outputs[name] = oracle.run_text(getattr(pipe, name), networks.TOKENS)["second_to_last"]
    return outputs


@functools.partial(jax.jit, static_argnums=0)
def run(model, params):
    inputs = networks.unet_inputs(dataclasses.asdict(model.unet.config))
    names = ("x", "t", "embeddings", "pooled", "time_ids")
    found = {"unet": apply(model, params, "unet", *(inputs.get(n) for n in names))}
    for name in {"text_encoder", "text_encoder_2"} & set(params):
        found[name] = apply(model, params, name, networks.TOKENS).hidden_states[-2]
    return found


merge = jax.jit(merge_lora)  # one compilation, not one for each operation on each shape


def load(model, params, files, scales):
    return merge(params, [read_lora(model, file) for file in files], list(scales))


def assert_close(ours, theirs, plain=None):
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert plain is None or relative(plain[name], theirs[name]) > 0.01, f"the LoRA changed nothing in {name}"
        assert relative(ours[name], theirs[name]) < TOLERANCE, name


@pytest.mark.filterwarnings("ignore")  # peft's and diffusers' own
@pytest.mark.parametrize("layout", CASES)
def test_equals_diffusers(layout, sd1, oracle, tmp_path):
    """One file at full strength and at half, and two files together."""
    model, params = sd1
    writer, pattern = CASES[layout]
    files = [
        written(tmp_path / "first.safetensors", writer, matrices(params, pattern)),
        written(tmp_path / "second.safetensors", writer, matrices(params, pattern, seed=1, rank=2)),
    ]
    mixtures = [(1.0, 0.0), (0.5, 0.0), (0.7, -0.4)] if layout in ("peft", "kohya") else [(0.7, -0.4)]
    plain = run(model, params)
    for scales, theirs in zip(mixtures, reference(oracle, pipeline(oracle), files, mixtures), strict=True):
        assert_close(run(model, load(model, params, files, scales)), theirs, plain)


@pytest.mark.filterwarnings("ignore")
def test_peft_metadata_gives_alpha(sd1, oracle, tmp_path):
    """diffusers writes the adapter's configuration into the file: alphas, some layer by layer, and rank scaling."""
    import diffusers
    import peft as library
    from peft.utils import get_peft_model_state_dict

    model, params = sd1
    pipe = pipeline(oracle)
    settings = {"lora_alpha": 2.0, "alpha_pattern": {"attn2.to_v": 7.0}, "init_lora_weights": False, "r": 4}
    pipe.unet.add_adapter(
        library.LoraConfig(**settings, target_modules=["to_q", "to_v"], rank_pattern={"attn1.to_q": 2}, use_rslora=True)
    )
    pipe.text_encoder.add_adapter(library.LoraConfig(**settings, target_modules=["q_proj", "fc1"]))
    adapters = {n: get_peft_model_state_dict(getattr(pipe, n)) for n in ("unet", "text_encoder")}
    configs = {n: getattr(pipe, n).peft_config["default"].to_dict() for n in adapters}
    diffusers.StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=adapters["unet"],
        text_encoder_lora_layers=adapters["text_encoder"],
        unet_lora_adapter_metadata=configs["unet"],
        text_encoder_lora_adapter_metadata=configs["text_encoder"],
    )
    merged = load_lora(model, params, tmp_path / "pytorch_lora_weights.safetensors")
    assert_close(run(model, merged), torch_outputs(oracle, pipe), run(model, params))


@pytest.mark.filterwarnings("ignore")
def test_dora_equals_peft(sd1, oracle, tmp_path):
    """Magnitudes of dense layers and convolutions, as peft applies them and diffusers writes them."""
    import diffusers
    import peft as library
    import torch
    from peft.utils import get_peft_model_state_dict

    model, params = sd1
    pipe = pipeline(oracle)
    for name, layers_of in (("unet", ["to_q", "conv1", "proj_in"]), ("text_encoder", ["q_proj", "fc1"])):
        network = getattr(pipe, name)
        network.add_adapter(
            library.LoraConfig(r=3, lora_alpha=2.0, use_dora=True, init_lora_weights=False, target_modules=layers_of)
        )
        with torch.no_grad():
            for key, x in network.named_parameters():
                if "lora_magnitude_vector" in key:
                    x *= torch.linspace(0.5, 1.5, x.numel()).reshape(x.shape)
    adapters = {n: get_peft_model_state_dict(getattr(pipe, n)) for n in ("unet", "text_encoder")}
    diffusers.StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=adapters["unet"],
        text_encoder_lora_layers=adapters["text_encoder"],
        **{f"{n}_lora_adapter_metadata": getattr(pipe, n).peft_config["default"].to_dict() for n in adapters},
    )
    lora = read_lora(model, tmp_path / "pytorch_lora_weights.safetensors")
    assert all(f.magnitude is not None for f in lora.values())
    assert_close(run(model, merge(params, lora)), torch_outputs(oracle, pipe), run(model, params))


def convolution(params, name: str = "conv_in"):
    """PyTorch's weight [out, in, 3, 3] of one of the UNet's convolutions."""
    return to_torch_layout(("kernel",), np.asarray(params["unet"][name]["kernel"]))


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


SGM = {  # the small SDXL's layers in the names of the original code, written out by hand
    "down_blocks.0.resnets.0.conv1": "input_blocks_1_0_in_layers_2",
    "down_blocks.0.downsamplers.0.conv": "input_blocks_2_0_op",
    "down_blocks.1.resnets.0.conv_shortcut": "input_blocks_3_0_skip_connection",
    "down_blocks.1.attentions.0.proj_in": "input_blocks_3_1_proj_in",
    "down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_out.0": (
        "input_blocks_3_1_transformer_blocks_1_attn1_to_out_0"
    ),
    "mid_block.resnets.0.time_emb_proj": "middle_block_0_emb_layers_1",
    "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj": "middle_block_1_transformer_blocks_0_ff_net_0_proj",
    "mid_block.resnets.1.conv2": "middle_block_2_out_layers_3",
    "up_blocks.0.resnets.1.conv2": "output_blocks_1_0_out_layers_3",
    "up_blocks.0.attentions.1.transformer_blocks.0.attn2.to_k": "output_blocks_1_1_transformer_blocks_0_attn2_to_k",
    "up_blocks.0.upsamplers.0.conv": "output_blocks_1_2_conv",
    "up_blocks.1.resnets.1.conv1": "output_blocks_3_0_in_layers_2",
    "time_embedding.linear_1": "time_embed_0",
    "add_embedding.linear_2": "label_emb_0_2",
    "conv_in": "input_blocks_0_0",
    "conv_out": "out_2",
}


def sgm(module, name, down, up):
    if module != "unet":
        return kohya(module, name, down, up, double=True)
    return {f"lora_unet_{SGM[name]}.lora_{part}.weight": x for part, x in (("down", down), ("up", up))}


kohya_double = functools.partial(kohya, double=True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("writer", [sgm, kohya_double, peft])
def test_sdxl_equals_diffusers(writer, sdxl, oracle, tmp_path):
    model, params = sdxl
    # The first layer of each text encoder: the last is not read.
    # And diffusers knows the added embedding's name in the original code alone.
    unet = [name for name in SGM if writer is not kohya_double or "add_embedding" not in name]
    pattern = rf"^unet\.({'|'.join(map(re.escape, unet))})$|layers\.0\."
    file = written(tmp_path / "xl.safetensors", writer, matrices(params, pattern))
    (theirs,) = reference(oracle, pipeline(oracle, double=True), [file], [(0.8,)])
    assert_close(run(model, load(model, params, [str(file)], (0.8,))), theirs, run(model, params))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
@pytest.mark.parametrize("double", [False, True])
def test_saved_file_opens_in_diffusers(layout, double, sd1, sdxl, oracle, tmp_path):
    model, params = sdxl if double else sd1
    pattern = "conv1|proj_in|attn1|ff|" + (r"layers\.0" if double else "self_attn")
    source = written(tmp_path / "source.safetensors", kohya, matrices(params, pattern))
    lora, saved = read_lora(model, source), tmp_path / "saved.safetensors"
    save_lora(saved, model, lora, layout)
    (theirs,) = reference(oracle, pipeline(oracle, double), [saved], [(1.0,)])
    assert_close(run(model, merge(params, lora)), theirs, run(model, params))


def list_of(oracle_module, classes):
    """Names of the dense layers in the order of cloneofsimo/lora, by walking PyTorch's modules as it does."""
    import torch

    found = []
    for prefix, ancestor in oracle_module.named_modules():
        if type(ancestor).__name__ in classes:
            found += [f"{prefix}.{n}" for n, m in ancestor.named_modules() if isinstance(m, torch.nn.Linear)]
    return found


@pytest.mark.parametrize("classes", [("Attention",), ("Attention", "GEGLU")])
def test_lists_have_the_order_of_pytorch(classes, sd1, oracle):
    params = sd1[1]
    listed = [[layer.name for layer in order] for order in list_orders(list(layers(params)))]
    assert [f"unet.{n}" for n in list_of(oracle.unet("sd1"), classes)] in listed
    assert [f"text_encoder.{n}" for n in list_of(oracle.text("vit_l"), ("CLIPAttention",))] in listed


def test_pickled_files(sd1, oracle, tmp_path):
    """Dictionaries and lists of tensors, as PyTorch saves them."""
    import torch

    model, params = sd1
    found = matrices(params, "self_attn")
    expected = read_lora(model, written(tmp_path / "a.safetensors", peft, found))
    tensors = {n: torch.from_numpy(x) for parts in found for n, x in peft(*parts).items()}
    torch.save(tensors, tmp_path / "named.bin")
    (order,) = (o for o in list_orders(list(layers(params))) if o and o[0].module == "text_encoder")
    named = {f"text_encoder.{name}": (up, down) for _, name, down, up in found}
    torch.save([torch.from_numpy(x).half() for layer in order for x in named[layer.name]], tmp_path / "list.pt")
    jax.tree.map(np.testing.assert_array_equal, read_lora(model, tmp_path / "named.bin"), expected)
    listed = read_lora(model, tmp_path / "list.pt")
    assert listed.keys() == expected.keys()
    half = jax.tree.map(lambda x: x.astype(jnp.float16), expected)
    jax.tree.map(np.testing.assert_array_equal, dict(listed), dict(half))


# ---- without PyTorch


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


def test_every_layer_has_spellings_of_its_own(sd1, sdxl):
    for model, params in (sd1, sdxl):
        found = {}
        for layer in layers(params):
            for spelling in spellings(layer, unet_table(model.unet.config)):
                assert found.setdefault(spelling, layer) == layer, spelling


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
        ({"model.weight": (2, 2)}, "tensor model.weight is no part of a LoRA"),
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
        ({"lora_unet_conv_in.hada_w1_a": (2, 2)}, "is of the kind LoHa"),
        ({"lora_unet_conv_in.lokr_w1": (2, 2)}, "is of the kind LoKr"),
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
        ({"lora_unet_conv_in.diff": (2, 2)}, "is of the kind LyCORIS"),
        (
            {"0": (32, 2), "1": (2, 32), "2": (32, 2), "3": (2, 32)},
            "it lists 2 layers, which matches the attention layers of no part of this model",
        ),
        (
            {
                "lora_unet_input_blocks_8_1_transformer_blocks_9_attn2_to_k.lora_down.weight": (4, 2048),
                "lora_unet_input_blocks_8_1_transformer_blocks_9_attn2_to_k.lora_up.weight": (1280, 4),
            },
            "is a LoRA for SDXL, this model is .*: it changes lora_unet_input_blocks_8_1.*, which the model has not",
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
    with pytest.raises(WeightsError, match="is of the kind DoRA but lacks the magnitude of unet"):
        read_lora(sd1[0], file)


def test_arguments_that_do_not_fit(fresh, sd1, tmp_path):
    params, lora = fresh
    with pytest.raises(WeightsError, match="2 LoRAs have 1 scales"):
        merge_lora(params, [lora, lora], [1.0])
    with pytest.raises(WeightsError, match=r"changes unet\.nowhere, which the model has not"):
        merge_lora(params, {"unet.nowhere": next(iter(lora.values()))})
    with pytest.raises(WeightsError, match=r"changes unet\.nowhere, which the model has not"):
        save_lora(tmp_path / "x.safetensors", sd1[0], {"unet.nowhere": next(iter(lora.values()))})
    with pytest.raises(WeightsError, match="layout 'other' is unknown; known are diffusers, kohya"):
        save_lora(tmp_path / "x.safetensors", sd1[0], lora, "other")
    with pytest.raises(WeightsError, match=r"none/x\.safetensors cannot be written"):
        save_lora(tmp_path / "none" / "x.safetensors", sd1[0], {})
    with pytest.raises(WeightsError, match=r"x\.safetensors is missing"):
        read_lora(sd1[0], tmp_path / "x.safetensors")
