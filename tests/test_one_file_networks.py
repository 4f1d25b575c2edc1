"""Networks that are one file in diffusers' names, without config.json: their sizes follow from the tensors."""

import dataclasses
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxdiff.config import ControlNetConfig, TinyVAEConfig
from jaxdiff.errors import WeightsError
from jaxdiff.io.configs import example_image, replace_config
from jaxdiff.io.controlnet import check_controlnet, load_controlnet
from jaxdiff.io.infer_config import published_vae
from jaxdiff.io.infer_diffusers import controlnet_config, controlnet_shapes, vae_from_names
from jaxdiff.io.modules import save_module
from jaxdiff.io.tensor_files import TensorSource, named_tensors
from jaxdiff.io.vae import check_tiny_vae, check_vae, load_tiny_vae, load_vae
from jaxdiff.models.controlnet import ControlNet, example_inputs
from jaxdiff.models.tiny_vae import AutoencoderTiny
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
    with pytest.raises(WeightsError, match=r"lacks the tensor down_blocks\.0\.resnets\.0\.conv1\.weight"):
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
    found, read = load_vae(*tiny, alone)
    assert found.vae.config == config
    assert_equal(read["vae"], params)


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
        (check_controlnet, "double_blocks.0.img_attn.qkv.weight", "is of Flux, which is not supported: supported are"),
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


@pytest.mark.parametrize("flag", ["vae", "preview_vae", "controlnet"])
def test_the_command_names_the_flag_before_weights_are_read(flag, sample_cli, monkeypatch):
    monkeypatch.setattr("jaxdiff.load", None)
    save_file({"lora_unet_x.alpha": np.zeros(1, np.float32)}, "lora.safetensors")
    beside = {"vae": [], "preview_vae": ["--preview"], "controlnet": ["--control_image=lora.safetensors"]}[flag]
    for path, sentence in (
        ("lora.safetensors", "holds a LoRA"),
        ("none.safetensors", "does not exist"),
        ("", "is no path: name a file or folder"),
    ):
        code, out, err = sample_cli("--prompt=a", f"--{flag}={path}", *beside)
        assert (code, out) == (2, [])
        assert f"--{flag}" in err
        assert sentence in err
    assert [p.name for p in Path().iterdir()] == ["lora.safetensors"]


def test_an_empty_model_is_named(sample_cli):
    code, out, err = sample_cli("--prompt=a", model="")
    assert (code, out) == (2, [])
    assert "--model='' is no path: name a file or folder, or leave --model out." in err
