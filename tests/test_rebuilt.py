"""A model that is changed, or built again in another type, keeps its ControlNets and its tiny autoencoder."""

import dataclasses

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxdiff.config import ControlNetConfig, TinyVAEConfig
from jaxdiff.io.configs import replace_config
from jaxdiff.io.pretrained import parts
from jaxdiff.io.textual_inversion import load_textual_inversion
from jaxdiff.models.controlnet import ControlNet
from jaxdiff.models.tiny_vae import AutoencoderTiny
from jaxdiff.training import init, trainables
from tests.support.tiny import tiny_model


@pytest.fixture(scope="module")
def steered():
    model = tiny_model()
    net = ControlNet(ControlNetConfig.from_dict(dataclasses.asdict(model.unet.config)), dtype=model.unet.dtype)
    return dataclasses.replace(model, controlnets=(net, net), tiny_vae=AutoencoderTiny(TinyVAEConfig()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_another_type(steered, dtype):
    again = init._with_dtype(steered, dtype, "full")
    assert [net.config for net in again.controlnets] == [net.config for net in steered.controlnets]
    assert {(net.dtype, net.remat) for net in again.controlnets} == {(again.unet.dtype, "full")}
    assert again.tiny_vae == steered.tiny_vae
    assert init._with_dtype(steered, "float32", False) == steered  # field by field, those to come too


def test_what_training_starts_from(steered, monkeypatch, tmp_path):
    params = {name: {"w": np.zeros(1)} for name in (*steered.modules, "controlnet")}
    monkeypatch.setattr(init, "load", lambda path: (steered, params))
    monkeypatch.setattr(init, "find", lambda path: tmp_path / "x.safetensors")
    model, read = init.starting_model({}, {"model": "x"}, None, None)
    assert (len(model.controlnets), set(read)) == (2, set(params))


def test_a_new_word_and_another_config(steered, tiny, tmp_path):
    save_file({"<cat>": np.ones((2, 16), np.float32)}, tmp_path / "cat.safetensors")
    nets = [{"w": np.zeros(1)}] * 2
    model, params = load_textual_inversion(steered, {**tiny[1], "controlnet": nets}, tmp_path / "cat.safetensors")
    assert (model.controlnets, model.tiny_vae) == (steered.controlnets, steered.tiny_vae)
    assert params["controlnet"] == nets
    assert replace_config(model, "vae", scaling_factor=0.5).controlnets == steered.controlnets


def test_what_was_trained_is_written_with_them(steered, monkeypatch, tmp_path):
    params = {name: name for name in (*steered.modules, "controlnet", "logit_scale")}
    assert set(parts(steered, params)) == {*steered.modules, "controlnet"}
    assert set(parts(tiny_model(), params)) == set(steered.modules)
    written = []
    monkeypatch.setattr(trainables, "save", lambda folder, model, params: written.append((model, params)))
    trainables.save_model(steered)(tmp_path, params)
    upscaler = replace_config(steered, "unet", num_class_embeds=41)
    trainables.save_model(upscaler)(tmp_path, params)
    assert [len(model.controlnets) for model, _ in written] == [2, 0]
    assert ["controlnet" in params for _, params in written] == [True, False]
