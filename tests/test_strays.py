"""One-file networks behind a prefix, and beside tensors that are none of theirs: passed over and named."""

import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxdiff.config import ConfigError, ControlNetConfig, TinyVAEConfig
from jaxdiff.errors import WeightsError
from jaxdiff.io.configs import example_image, replace_config
from jaxdiff.io.controlnet import check_controlnet, controlnet_table, load_controlnet
from jaxdiff.io.modules import save_module
from jaxdiff.io.original_layout import VAE_PREFIX, place, vae_table
from jaxdiff.io.pretrained import load, save
from jaxdiff.io.single_file import _metadata
from jaxdiff.io.tensor_files import named_tensors, open_tensors
from jaxdiff.io.vae import load_tiny_vae, load_vae
from jaxdiff.models.controlnet import ControlNet, example_inputs
from jaxdiff.models.tiny_vae import AutoencoderTiny
from tests.support.comparison import assert_equal, drawn
from tests.support.published import tensors_of
from tests.support.tiny import tiny_params


@pytest.fixture(scope="module")
def controlnet(tiny):
    widths = {"conditioning_embedding_out_channels": (8, 16)}
    net = ControlNet(ControlNetConfig.from_dict(dataclasses.asdict(tiny[0].unet.config) | widths))
    return net, drawn(net, example_inputs(net.config))["params"]


STRAYS = {  # by a group each, what no network of these has
    "surplus.weight": np.zeros(3, np.float32),
    "down_blocks.0.resnets.0.conv1.alpha": np.zeros((), np.float32),
    "decoder.conv_in.lora_down.weight": np.zeros((1, 3), np.float32),
    "optimizer.0": np.zeros(2, np.float32),
}


def named_in_a_warning(caplog) -> int:
    return sum(
        f"{len(STRAYS)} tensors that drawing does not need are passed over" in r.getMessage()
        and all(name in r.getMessage() for name in STRAYS)
        for r in caplog.records
    )


@pytest.mark.slow
@pytest.mark.parametrize("described", [False, True], ids=["alone", "config.json"])
@pytest.mark.parametrize("prefix", ["", "controlnet.", "control_model.", "pipeline.controlnet."])
def test_a_controlnet_behind_a_prefix_and_beside_strays(prefix, described, tiny, controlnet, tmp_path, caplog):
    net, params = controlnet
    file = tmp_path / "a.safetensors"
    if described:
        save_module(tmp_path, net, params)
    save_file({prefix + n: x for n, x in named_tensors(params)} | STRAYS, file)
    found, read = load_controlnet(file, like=tiny[0].unet.config)
    assert found.config.to_dict() == net.config.to_dict()
    assert_equal(read, params)
    assert named_in_a_warning(caplog) == 1
    check_controlnet(file)
    for own in ("down_blocks.0.resnets.9.conv1.weight", "controlnet_down_blocks.99.weight", "class_embedding.weight"):
        save_file({prefix + n: x for n, x in named_tensors(params)} | {prefix + own: np.zeros(3, np.float32)}, file)
        with pytest.raises((ConfigError, WeightsError), match=f"{own}|UNet has class embeddings"):
            load_controlnet(file, like=tiny[0].unet.config)


@pytest.mark.parametrize("prefix", ["", "control_model.", "controlnet."])
def test_a_controlnet_of_the_original_layout_beside_strays(prefix, tiny, controlnet, tmp_path, caplog):
    net, params = controlnet
    table, file = controlnet_table(net.config), tmp_path / "a.safetensors"
    tensors = {place(n, table, prefix).name: x for n, x in named_tensors(params)}
    strays = {n.replace("down_blocks.0.resnets.0.conv1", "input_blocks.1.0"): x for n, x in STRAYS.items()}
    save_file(tensors | {n if n == "surplus.weight" else prefix + n: x for n, x in strays.items()}, file)
    assert_equal(load_controlnet(file, like=tiny[0].unet.config)[1], params)
    for name in strays:
        assert name in caplog.text


def test_what_stands_behind_a_prefix_is_called_what_it_is(controlnet, tmp_path):
    tensors = dict(named_tensors(controlnet[1]))
    file = tmp_path / "a.safetensors"
    for names, sentence in (
        (
            [f"{net}.{n}" for net in ("nets.0", "nets.1") for n in tensors],
            r"several ControlNets, at nets\.0\. and nets",
        ),
        ([f"controlnet.{n}" for n in (*tensors, "task_embedding")], "holds a ControlNet Union"),
        (["controlnet.controlnet_blocks.0.weight"], "holds a ControlNet of a diffusion transformer"),
        (["controlnet.unrelated"], "holds no ControlNet"),
    ):
        save_file({n: tensors.get(n.partition(".")[2], np.zeros(1, np.float32)) for n in names}, file)
        with pytest.raises(WeightsError, match=sentence):
            check_controlnet(file)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["diffusers", "config.json", "vae.", "original", "first_stage_model.", "tiny"])
def test_an_autoencoder_beside_strays(form, tiny, tmp_path, caplog):
    model = replace_config(tiny[0], "vae", scaling_factor=0.5)
    expected, file = tiny_params(model, seed=1)["vae"], tmp_path / "a.safetensors"
    own = "decoder.conv_in.surplus"
    if form == "tiny":
        module = AutoencoderTiny(TinyVAEConfig(3, 3, (8, 8), (8, 8), (1, 2), (2, 1)))
        expected = drawn(module, example_image(module.config))["params"]
        own = "decoder.layers.9.surplus"
    tensors = dict(named_tensors(expected))
    if form in ("original", "first_stage_model."):
        prefix = "" if form == "original" else form
        own, table = prefix + own, vae_table(model.vae.config)
        places = {n: place(n, table, prefix) for n in tensors}
        tensors = {at.name: tensors[n][..., None, None] if at.squeezed else tensors[n] for n, at in places.items()}
    elif form == "vae.":
        own, tensors = form + own, {form + n: x for n, x in tensors.items()}
    elif form == "config.json":
        save_module(tmp_path, model.vae, expected)
    save_file(tensors | STRAYS, file)
    assert_equal(load_vae(model, tiny[1], file)[1]["vae"], expected)
    assert named_in_a_warning(caplog) == 1
    if form == "tiny":
        assert_equal(load_tiny_vae(file)[1], expected)
    save_file(tensors | {own: np.zeros(3, np.float32)}, file)
    with pytest.raises(WeightsError, match=f"tensors .* no place for, first .*{own.removeprefix('vae.')}"):
        load_vae(model, tiny[1], file)


def test_an_incomplete_autoencoder_is_not_needed_beside_another(tiny, tmp_path):
    """Of a file some of whose tensors are missing, and of a folder without the weights; alone it is said."""
    model, params = tiny
    save(tmp_path / "m", model, params)
    tensors, metadata = tensors_of(*tiny), {"jaxdiff": json.dumps(_metadata(model))}
    kinds = {
        "half": [n for n in tensors if n.startswith(f"{VAE_PREFIX}decoder.")],
        "rest": [n for n in tensors if n.startswith(VAE_PREFIX) and not n.endswith("encoder.conv_in.bias")],
        "one": [f"{VAE_PREFIX}decoder.norm_out.bias"],
    }
    for name, without in kinds.items():
        path = tmp_path / f"{name}.safetensors"
        save_file({n: x for n, x in tensors.items() if n not in without}, path, metadata=metadata)
        found, read = load(path, vae=tmp_path / "m/vae")
        assert found.vae == model.vae
        assert_equal(read, params)
        with pytest.raises(WeightsError, match=r"has no autoencoder .* as --vae|lacks the tensor first_stage_model"):
            load(path)
    (tmp_path / "m/vae").rename(tmp_path / "vae")
    (tmp_path / "m/vae").mkdir()
    (tmp_path / "m/vae/config.json").write_bytes((tmp_path / "vae/config.json").read_bytes())
    assert_equal(load(tmp_path / "m", vae=tmp_path / "vae")[1], params)
    with pytest.raises(WeightsError, match="is missing"):
        load(tmp_path / "m")


@pytest.mark.parametrize("wrapper", ["_orig_mod", "module", "_fsdp_wrapped_module", "module._orig_mod"])
def test_wrappers_within_names(wrapper, tmp_path):
    """As PyTorch puts them where a part of a model was wrapped."""
    names = {f"unet.{wrapper}.conv_in.weight": "unet.conv_in.weight", "vae.conv_in.weight": "vae.conv_in.weight"}
    save_file({n: np.full(1, i, np.float32) for i, n in enumerate(names)}, tmp_path / "x.safetensors")
    source = open_tensors(tmp_path / "x.safetensors")
    assert set(source.shapes) == set(names.values())
    assert [source.read(n)[0] for n in names.values()] == [0, 1]
    twice = {"a.module.b": np.zeros(1), "a.b": np.ones(1)}  # no wrapper, then
    save_file(twice, tmp_path / "y.safetensors")
    assert set(open_tensors(tmp_path / "y.safetensors").shapes) == set(twice)
