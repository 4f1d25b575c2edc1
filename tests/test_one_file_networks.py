"""Networks that are one file in diffusers' names, without config.json: their sizes follow from the tensors."""

import dataclasses
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxdiff
from jaxdiff.config import ControlNetConfig, TinyVAEConfig
from jaxdiff.errors import WeightsError
from jaxdiff.io.configs import example_image, replace_config
from jaxdiff.io.controlnet import check_controlnet, load_controlnet
from jaxdiff.io.images import write_png
from jaxdiff.io.infer_config import published_vae
from jaxdiff.io.infer_diffusers import controlnet_config, controlnet_shapes, vae_from_names
from jaxdiff.io.lora import read_lora
from jaxdiff.io.modules import save_module
from jaxdiff.io.tensor_files import TensorSource, named_tensors
from jaxdiff.io.textual_inversion import read_textual_inversion
from jaxdiff.io.vae import check_tiny_vae, check_vae, load_tiny_vae, load_vae
from jaxdiff.models.controlnet import ControlNet, example_inputs
from jaxdiff.models.tiny_vae import AutoencoderTiny
from jaxdiff.training import init
from tests.support.comparison import assert_equal, drawn
from tests.support.published import CONTROLNETS
from tests.support.tiny import tiny_params


def described(net) -> TensorSource:
    """A PyTorch network's file, as far as its header."""
    return TensorSource(Path("x.safetensors"), {n: list(x.shape) for n, x in net.state_dict().items()}, None)


@pytest.mark.parametrize("name", CONTROLNETS)
def test_config_of_a_published_controlnet_from_its_tensors(name):
    """As PyTorch diffusers writes it; on its meta device, without the gigabytes."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        net = diffusers.ControlNetModel(**CONTROLNETS[name])
    source = described(net)
    found = controlnet_config(source, controlnet_shapes(source))
    assert found.to_dict() == ControlNetConfig.from_dict(dict(net.config)).to_dict()


def test_config_of_the_published_autoencoder_from_its_tensors():
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    for more in ({}, {"use_quant_conv": False, "use_post_quant_conv": False, "latent_channels": 16}):
        expected = dataclasses.replace(published_vae("sd1"), **more)
        with torch.device("meta"):
            vae = diffusers.AutoencoderKL(**{k: v for k, v in expected.to_dict().items() if k[0] != "_"})
        assert vae_from_names(described(vae)) == expected


@pytest.fixture(scope="module")
def controlnet(tiny):
    widths = {"conditioning_embedding_out_channels": (8, 16)}
    net = ControlNet(ControlNetConfig.from_dict(dataclasses.asdict(tiny[0].unet.config) | widths))
    return net, drawn(net, example_inputs(net.config))["params"]


def test_a_controlnet_alone(tiny, controlnet, tmp_path):
    """In float16 as safetensors and bfloat16 as .bin; heads and groups, which no tensor tells, are the UNet's."""
    torch = pytest.importorskip("torch")
    net, params = controlnet
    tensors = {n: x.astype(np.float16) for n, x in named_tensors(params)}
    save_file(tensors, tmp_path / "canny.safetensors")
    found, read = load_controlnet(tmp_path / "canny.safetensors", like=tiny[0].unet.config)
    assert found.config.to_dict() == net.config.to_dict()
    assert_equal(read, jax.tree.map(lambda x: np.asarray(x).astype(np.float16).astype(np.float32), params))
    state = {n: torch.from_numpy(x.astype(np.float32)).bfloat16() for n, x in tensors.items()}
    torch.save(state, tmp_path / "canny.bin")
    found, read = load_controlnet(tmp_path / "canny.bin", dtype="bfloat16", like=tiny[0].unet.config)
    assert (found.config.to_dict(), found.dtype) == (net.config.to_dict(), "bfloat16")
    exact = {n: x.float().numpy() for n, x in state.items()}
    for name, x in named_tensors(read, np.float32):
        np.testing.assert_array_equal(x, exact[name], err_msg=name)
    tensors.pop("down_blocks.0.resnets.0.conv1.weight")
    save_file(tensors, tmp_path / "canny.safetensors")
    with pytest.raises(WeightsError, match=r"lacks the tensor down_blocks\.0\.resnets\.0\.conv1\.weight: fetch the"):
        load_controlnet(tmp_path / "canny.safetensors", like=tiny[0].unet.config)
    save_file({n: x for n, x in named_tensors(params) if n != "conv_in.bias"}, tmp_path / "canny.safetensors")
    with pytest.raises(WeightsError, match=r"lacks the tensor conv_in\.bias: fetch it again\.$"):  # of no config.json
        load_controlnet(tmp_path / "canny.safetensors", like=tiny[0].unet.config)


def test_an_autoencoder_alone(tiny, tmp_path):
    """In half precision, under today's names of its attention and those of old files."""
    torch = pytest.importorskip("torch")
    model = replace_config(tiny[0], "vae", scaling_factor=0.5)
    other = tiny_params(model, seed=1)
    half = {n: x.astype(np.float16) for n, x in named_tensors(other["vae"])}
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, x in half.items():
        for new, before in old.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{before}.")
        renamed[name] = torch.from_numpy(x)
    save_file(half, tmp_path / "a.safetensors")
    torch.save({"state_dict": renamed, "epoch": np.float64(3)}, tmp_path / "c.vae.pt")
    expected = jax.tree.map(lambda x: np.asarray(x).astype(np.float16).astype(np.float32), other["vae"])
    for name in ("a.safetensors", "c.vae.pt"):
        found, params = load_vae(model, tiny[1], tmp_path / name)
        assert found == model
        assert_equal(params["vae"], expected)
        check_vae(tmp_path / name)
    for prefix in ("vae.", "first_stage_model."):  # of a whole model's names
        save_file({prefix + n: x for n, x in half.items()}, tmp_path / "a.safetensors")
        assert_equal(load_vae(model, tiny[1], tmp_path / "a.safetensors")[1]["vae"], expected)


def test_a_tiny_autoencoder_alone(tiny, tmp_path):
    config = TinyVAEConfig(3, 3, (8, 8), (8, 8), (1, 2), (2, 1))
    module = AutoencoderTiny(config)
    params = drawn(module, example_image(config))["params"]
    save_module(tmp_path / "folder", module, params)
    alone = tmp_path / "taesd.safetensors"
    shutil.copy(tmp_path / "folder/diffusion_pytorch_model.safetensors", alone)
    check_tiny_vae(alone)
    check_tiny_vae(tmp_path / "folder")
    for found, read in (load_tiny_vae(alone), load_tiny_vae(tmp_path / "folder")):
        assert found == module
        assert_equal(read, params)
    for prefix in ("", "vae.", "first_stage_model."):
        save_file({prefix + n: x for n, x in named_tensors(params)}, alone)
        found, read = load_vae(*tiny, alone)
        assert found.vae.config == config
        assert_equal(read["vae"], params)
        assert_equal(load_tiny_vae(alone)[1], params)
        check_tiny_vae(alone)


@pytest.mark.parametrize(
    ("check", "tensor", "sentence"),
    [
        (check_controlnet, "lora_controlnet", "holds a Control-LoRA, which is not supported: take a whole ControlNet"),
        (check_controlnet, "adapter.body.0.resnets.0.block1.weight", "holds a T2I-Adapter, which is not supported"),
        (check_controlnet, "body.0.block1.weight", "holds a T2I-Adapter"),
        (check_controlnet, "ip_adapter.1.to_k_ip.weight", "holds an IP-Adapter, which is not supported: leave it out"),
        (check_controlnet, "image_proj.norm.weight", "holds an IP-Adapter"),
        (check_controlnet, "lllite_unet_x.down.0.weight", "holds a ControlNet-LLLite"),
        (check_controlnet, "difference", "holds a ControlNet as the difference from a model's weights, which is not"),
        (check_controlnet, "task_embedding", "holds a ControlNet Union"),
        (check_controlnet, "down_blocks.0.base_to_ctrl.0.weight", "holds a ControlNet-XS"),
        (check_controlnet, "controlnet_x_embedder.weight", r"holds a ControlNet of a diffusion transformer"),
        (check_controlnet, "lora_unet_x.lora_up.weight", "holds a LoRA: load a model, then .* or to --lora"),
        (check_controlnet, "unet.x.lora_A.weight", "holds a LoRA"),
        (check_controlnet, "<cat>", "holds a textual inversion"),
        (check_controlnet, "first_stage_model.encoder.conv_in.weight", "holds an autoencoder alone"),
        (check_controlnet, "down_blocks.0.resnets.0.conv1.weight", "holds a UNet of a diffusers folder"),
        (check_controlnet, "model.diffusion_model.out.2.weight", "holds a whole checkpoint, not a ControlNet"),
        (
            check_controlnet,
            "double_blocks.0.img_attn.qkv.weight",
            "is of Flux, whose tokenizers no file of weights holds: give a diffusers folder",
        ),
        (check_controlnet, "something", "holds no ControlNet: it lacks the tensor controlnet_cond_embedding.conv_in"),
        (check_vae, "controlnet_cond_embedding.conv_in.weight", "holds a ControlNet: give it to"),
        (check_vae, "text_model.encoder.layers.0.self_attn.k_proj.weight", "holds a text encoder"),
        (check_vae, "encoder.layers.0.self_attn.k_proj.weight", "holds a text encoder"),
        (check_vae, "something", "holds no autoencoder"),
        (check_tiny_vae, "encoder.conv_in.weight", "holds an autoencoder alone: load a model, then .* or to --vae"),
        (check_tiny_vae, "first_stage_model.decoder.conv_in.weight", "holds an autoencoder alone"),
        (check_tiny_vae, "decoder.up_blocks.0.resnets.0.conv1.weight", "holds an autoencoder alone"),
        (check_tiny_vae, "something", "lacks the tensor|unexpected shapes"),
    ],
)
def test_what_is_given_as_a_network_is_called_what_it_is(check, tensor, sentence, tmp_path):
    save_file({tensor: np.zeros(1, np.float32)}, tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match=rf"x\.safetensors .*{sentence}"):
        check(tmp_path / "x.safetensors")


UPSCALER = r"holds an image upscaler \(ESRGAN\): give it to jaxdiff\.load_upscaler, or to --upscaler"


@pytest.mark.parametrize(
    ("tensor", "sentence"),
    [
        (
            "model.diffusion_model.out.2.weight",
            "holds a whole checkpoint, not a .*: give it to jaxdiff.load, or to --m",
        ),
        ("control_model.zero_convs.0.0.weight", "holds a ControlNet: give it to .* or to --controlnet"),
        ("controlnet_cond_embedding.conv_in.weight", "holds a ControlNet: give it to .* or to --controlnet"),
        ("first_stage_model.encoder.conv_in.weight", "holds an autoencoder alone: load a model, .* or to --vae"),
        ("decoder.up_blocks.0.resnets.0.conv1.weight", "holds an autoencoder alone: load a model, .* or to --vae"),
        ("encoder.layers.0.weight", "holds a tiny autoencoder: load a model, .* to --preview_vae"),
        ("params_ema.conv_first.weight", UPSCALER),
        ("body.0.rdb1.conv1.weight", UPSCALER),
        (
            "layers.0.residual_group.blocks.0.norm1.weight",
            r"holds an image upscaler of another .*, which is not supported",
        ),
        ("down_blocks.0.resnets.0.conv1.weight", "holds a UNet of a diffusers folder"),
        ("text_model.encoder.layers.0.self_attn.k_proj.weight", "holds a text encoder"),
        ("ip_adapter.1.to_k_ip.weight", "holds an IP-Adapter, which is not supported: leave it out"),
        ("lora_controlnet", "holds a Control-LoRA"),
        ("320.0.linear.0.weight", "holds a hypernetwork, which is not supported: leave it out"),
        ("double_blocks.0.img_attn.qkv.weight", "is of Flux, whose tokenizers no file of weights holds"),
    ],
)
def test_what_is_given_as_an_adapter_is_called_what_it_is(tensor, sentence, tiny, tmp_path):
    model, _ = tiny
    file = tmp_path / "x.safetensors"
    for beside in ({}, {"lora_unet_conv_in.alpha": np.zeros(1)}):
        save_file({tensor: np.zeros(1, np.float32), "other": np.zeros(1), **beside}, file)
        with pytest.raises(WeightsError, match=rf"x\.safetensors {sentence}"):
            read_lora(model, file)
    save_file({tensor: np.zeros(1, np.float32)}, file)
    with pytest.raises(WeightsError, match=rf"x\.safetensors {sentence}"):
        read_textual_inversion(model, [(file, None)])


def test_adapters_are_told_apart(tiny, tmp_path):
    file = tmp_path / "x.safetensors"
    save_file({"<cat>": np.zeros((1, 16), np.float32)}, file)
    with pytest.raises(WeightsError, match=r"holds a textual inversion: load a model, .* or to --embedding"):
        read_lora(tiny[0], file)
    save_file({"unet.conv_in.lora_A.weight": np.zeros((1, 16), np.float32)}, file)
    with pytest.raises(WeightsError, match=r"is a LoRA: it is not a textual inversion; give it to .* or to --lora"):
        read_textual_inversion(tiny[0], [(file, None)])


@pytest.mark.parametrize("flag", ["vae", "preview_vae", "controlnet"])
def test_the_command_names_the_flag_before_weights_are_read(flag, sample_cli, monkeypatch):
    monkeypatch.setattr("jaxdiff.load", None)
    save_file({"lora_unet_x.alpha": np.zeros(1, np.float32)}, "lora.safetensors")
    beside = {"vae": [], "preview_vae": ["--preview"], "controlnet": ["--control_image=lora.safetensors"]}[flag]
    for path, sentence in (
        ("lora.safetensors", "holds a LoRA"),
        ("none.safetensors", "does not exist"),
        ("", "is not a path: name a file or folder"),
    ):
        code, out, err = sample_cli("--prompt=a", f"--{flag}={path}", *beside)
        assert (code, out) == (2, [])
        assert f"--{flag}" in err
        assert sentence in err
    assert [p.name for p in Path().iterdir()] == ["lora.safetensors"]


def test_an_empty_model_is_named(sample_cli):
    code, out, err = sample_cli("--prompt=a", model="")
    assert (code, out) == (2, [])
    assert "--model='' is not a path: name a file or folder, or leave --model out." in err


@pytest.fixture(scope="module")
def one_file(tiny, tmp_path_factory):
    """The tiny model as a one-file checkpoint."""
    path = tmp_path_factory.mktemp("one") / "tiny.safetensors"
    jaxdiff.save(path, *tiny)
    return path


@pytest.fixture
def unread(monkeypatch):
    """Fails where the weights of a model are read."""
    monkeypatch.setattr(jaxdiff, "load", lambda *args, **more: pytest.fail("weights were read"))


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ("lora.safetensors", "lora.safetensors holds a LoRA: load a model, then give the file to jaxdiff.load_lora"),
        ("vae.safetensors", "vae.safetensors holds an autoencoder alone"),
        ("none.safetensors", "The model's file none.safetensors does not exist"),
        ("damaged.safetensors", "damaged.safetensors is damaged or not a safetensors file"),
        ("pointer.ckpt", "pointer.ckpt is a Git LFS pointer"),
        ("notes.txt", "notes.txt is not a model file"),
        ("folder", "model_index.json is missing"),
        ("nowhere", "nowhere is neither a folder nor a bundled model"),
    ],
)
def test_a_model_that_is_none_names_the_flag_before_weights_are_read(model, sentence, sample_cli, unread):
    save_file({"lora_unet_x.lora_up.weight": np.zeros(1, np.float32)}, "lora.safetensors")
    save_file({"encoder.conv_in.weight": np.zeros(1, np.float32)}, "vae.safetensors")
    Path("damaged.safetensors").write_bytes(b"no tensors")
    Path("pointer.ckpt").write_text("version https://git-lfs.github.com/spec/v1\n")
    Path("notes.txt").write_text("x")
    Path("folder").mkdir()
    before = sorted(Path().iterdir())
    code, out, err = sample_cli("--prompt=a", "--output=new/x.png", model=model)
    assert (code, out) == (2, [])
    assert err.startswith("sample.py: error: --model: ")
    assert sentence in err
    assert sorted(Path().iterdir()) == before


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["--prompt_2=a"], "--prompt_2 is for the second text encoder of SDXL"),
        (["--clip_skip=99"], "--clip_skip 99 must be 0 to 1"),
        (["--noise_level=3"], "--noise_level is for upscaling models"),
        (["--height=7"], "--height 7 must be"),
        (["--height=1000000", "--width=1000000"], "--height 1000000 and width 1000000 take at least"),
        (["--control_image=a.png"], "--control_image are for ControlNets"),
        (["--lora=lora.safetensors"], "--lora: lora.safetensors has no up matrix"),
        (["--vae=wide.safetensors"], "--vae: wide.safetensors has 3 latent channels, each of 2 pixels, the model 4"),
    ],
)
def test_flags_of_a_one_file_checkpoint_are_checked_by_its_header(given, sentence, one_file, sample_cli, unread):
    write_png("a.png", np.zeros((16, 16, 3)))
    save_file({"unet.conv_in.lora_A.weight": np.zeros((1, 4, 3, 3), np.float32)}, "lora.safetensors")
    config = TinyVAEConfig(3, 3, (8, 8), (8, 8), (1, 2), (2, 1), latent_channels=3)
    save_file(dict(named_tensors(drawn(AutoencoderTiny(config), example_image(config))["params"])), "wide.safetensors")
    code, out, err = sample_cli("--prompt=a", "--output=new/x.png", *given, model=one_file)
    assert (code, out) == (2, [])
    assert err.startswith("sample.py: error: ")
    assert sentence in err
    assert not Path("new").exists()


@pytest.mark.slow
@pytest.mark.parametrize("form", ["file", "file and config", "folder", "original", "tiny", "checkpoint"])
def test_training_starts_from_what_vae_opens(form, tiny, one_file, tmp_path, monkeypatch):
    """Beside a one-file checkpoint; a plan knows it by its header."""
    model, expected = tiny[0], tiny_params(tiny[0], seed=1)["vae"]
    path = tmp_path / "vae"
    save_module(path, model.vae, expected)
    whole = tmp_path / "whole.safetensors"
    jaxdiff.save(whole, model, {**tiny[1], "vae": expected})
    if form.startswith("file"):
        path = path / "diffusion_pytorch_model.safetensors"
        path = path if form == "file and config" else Path(shutil.move(path, tmp_path / "x.safetensors"))
    elif form == "original":
        path = tmp_path / "x.vae.safetensors"
        save_file({n: x for n, x in load_file(whole).items() if n.startswith("first_stage_model.")}, path)
    elif form == "tiny":
        config, path = TinyVAEConfig(3, 3, (8, 8), (8, 8), (1, 2), (2, 1)), tmp_path / "taesd.safetensors"
        expected = drawn(AutoencoderTiny(config), example_image(config))["params"]
        save_file(dict(named_tensors(expected)), path)
    elif form == "checkpoint":
        path = whole
    given = {"model": str(one_file), "vae": str(path)}
    made, params = init.starting_model({}, given, None, None)
    assert made.vae == load_vae(*tiny, path)[0].vae
    assert_equal(params["vae"], expected)
    assert_equal(params["unet"], tiny[1]["unet"])
    monkeypatch.setattr(init, "load_tensors", None)
    assert init.described_model({}, given, None) == made


def test_every_part_may_come_from_a_one_file_checkpoint(tiny, one_file, tmp_path):
    model, other = tiny[0], tiny_params(tiny[0], seed=1)
    jaxdiff.save(tmp_path / "other.safetensors", model, other)
    save_module(tmp_path / "unet", model.unet, other["unet"])
    for path in ("other.safetensors", "unet"):
        made, params = init.starting_model({}, {"model": str(one_file), "unet": str(tmp_path / path)}, None, None)
        assert made == model
        assert_equal(params, {**tiny[1], "unet": other["unet"]})
    made, params = init.starting_model({}, dict.fromkeys(("unet", "vae", "text_encoder"), str(one_file)), None, None)
    assert (made.unet, made.vae, made.tokenizer) == (model.unet, model.vae, model.tokenizer)
    assert_equal(params, tiny[1])
    assert init.described_model({}, {"model": str(one_file)}, None) == model
    save_file({"lora_unet_x.lora_up.weight": np.zeros(1, np.float32)}, tmp_path / "lora.safetensors")
    for entry in ("model", "vae", "unet"):
        with pytest.raises(WeightsError, match=rf"^--config\.init_from\.{entry}: .*lora\.safetensors holds a LoRA"):
            init.described_model({}, {"model": str(one_file), entry: str(tmp_path / "lora.safetensors")}, None)
