"""LoRA against PyTorch diffusers with peft: the names, layouts and lists of the programs that write them."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.io.lora import load_lora, read_lora, save_lora
from jaxdiff.io.lora_layers import layers
from jaxdiff.io.lora_names import list_orders, spellings
from jaxdiff.io.original_layout import unet_table
from jaxdiff.models.model import apply
from tests.support import networks
from tests.support.lora_files import (
    ATTENTION,
    drawn_params,
    full,
    kohya,
    matrices,
    merge,
    older,
    peft,
    processor,
    small_model,
    written,
)

# The small networks alone agree to 1e-5 (test_models); a merged weight is rounded once more, at 6e-8.
TOLERANCE = 1e-5
EVERYWHERE = r"conv|to_|proj|ff|fc|linear|time_emb"


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


CASES = {  # layout -> how it is written, and the layers that the layout can name
    "peft": (peft, EVERYWHERE),
    "older": (older, ATTENTION),
    "processor": (processor, ATTENTION),
    "kohya": (kohya, EVERYWHERE),
}


@pytest.fixture(scope="module")
def oracle():
    pytest.importorskip("torch")
    pytest.importorskip("peft")
    from tests.support import oracle

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


SGM_DOTS = {  # the same with dots
    name: re.sub(r"_(?=\d)|(?<=\d)_", ".", name).replace("ff_net", "ff.net") for name in SGM.values()
}


LDM_DOTS = {  # the small SD 1's, whose levels attend in the other order, written out by hand
    "conv_in": "input_blocks.0.0",
    "down_blocks.0.resnets.0.conv1": "input_blocks.1.0.in_layers.2",
    "down_blocks.0.attentions.1.proj_in": "input_blocks.2.1.proj_in",
    "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q": "input_blocks.2.1.transformer_blocks.0.attn1.to_q",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
    "down_blocks.1.resnets.0.conv_shortcut": "input_blocks.4.0.skip_connection",
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0": "middle_block.1.transformer_blocks.0.attn2.to_out.0",
    "mid_block.resnets.1.time_emb_proj": "middle_block.2.emb_layers.1",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.2.1.conv",
    "up_blocks.1.attentions.0.transformer_blocks.0.ff.net.2": "output_blocks.3.1.transformer_blocks.0.ff.net.2",
    "up_blocks.1.resnets.2.conv2": "output_blocks.5.0.out_layers.3",
    "time_embedding.linear_2": "time_embed.2",
    "conv_out": "out.2",
}


def original(prefixes, alpha=True):
    """Names of the original code behind a prefix a module, as OneTrainer and ComfyUI write them."""

    def writer(module, name, down, up, double=True):
        inner = (SGM_DOTS[SGM[name]] if double else LDM_DOTS[name]) if module == "unet" else full(module, name)
        stem = f"{prefixes[module]}.{inner}"
        tensors = {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
        return tensors | ({f"{stem}.alpha": np.array(2.0, np.float32)} if alpha else {})

    return writer


ORIGINAL = {
    "OneTrainer": original({"unet": "unet", "text_encoder": "clip_l", "text_encoder_2": "clip_g"}),
    "ComfyUI": original(
        {
            "unet": "diffusion_model",
            "text_encoder": "text_encoders.clip_l.transformer",
            "text_encoder_2": "text_encoders.clip_g.transformer",
        },
        alpha=False,
    ),
    "ComfyUI, SD 2": original(  # whose text encoder is OpenCLIP's
        {
            "unet": "diffusion_model",
            "text_encoder": "text_encoders.clip_h.transformer",
            "text_encoder_2": "text_encoders.clip_g.transformer",
        }
    ),
}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("double", [False, True], ids=["sd1", "sdxl"])
@pytest.mark.parametrize("writer", ORIGINAL)
def test_names_of_the_original_code_mean_those_of_diffusers(writer, double, dtype, sd1, sdxl, tmp_path):
    model, params = sdxl if double else sd1
    unet = SGM if double else LDM_DOTS
    found = matrices(params, rf"^unet\.({'|'.join(map(re.escape, unet))})$|layers\.0\.", rank=2)
    assert sum(module == "unet" for module, *_ in found) == len(unet)
    found = [(module, name, *(np.asarray(x, jnp.dtype(dtype)) for x in pair)) for module, name, *pair in found]
    expected = read_lora(model, written(tmp_path / "a.safetensors", peft, found))
    named = functools.partial(ORIGINAL[writer], double=double)
    ours = read_lora(model, written(tmp_path / "b.safetensors", named, found))
    assert {f.down.dtype.name for f in ours.values()} == {dtype}
    assert {f.alpha for f in ours.values()} == {2.0}
    assert len(ours) == len(found)
    jax.tree.map(np.testing.assert_array_equal, dict(ours), dict(expected))


def sgm(module, name, down, up):
    if module != "unet":
        return kohya(module, name, down, up, double=True)
    return {f"lora_unet_{SGM[name]}.lora_{part}.weight": x for part, x in (("down", down), ("up", up))}


kohya_double = functools.partial(kohya, double=True)


@pytest.mark.slow
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


def test_every_layer_has_spellings_of_its_own(sd1, sdxl):
    for model, params in (sd1, sdxl):
        found = {}
        for layer in layers(params):
            for spelling in spellings(layer, unet_table(model.unet.config)):
                # peft calls the layers of both text encoders alike: their shapes and its config tell them apart.
                bare = (
                    spelling.startswith(("base_model.model.", "text_", "lycoris_")) and layer.module == "text_encoder_2"
                )
                known = found.setdefault(spelling, layer)
                assert known == layer or (bare and known.module == "text_encoder"), spelling
