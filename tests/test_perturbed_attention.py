"""Perturbed-attention guidance: which layers, whose scale, and who has no use for it. test_tasks.py has its images."""

import contextlib
import dataclasses
import json

import numpy as np
import pytest

import jaxdiff
from jaxdiff.config import ConfigError, PipelineOptions, UNetConfig
from jaxdiff.errors import ArgumentError
from jaxdiff.io.images import read_metadata
from jaxdiff.models.perturbed import perturbed_attention
from jaxdiff.models.unet import UNet2DConditionModel
from tests.support import networks
from tests.support.comparison import TOLERANCE, drawn, error


def with_options(model, **options):
    return dataclasses.replace(model, options=dataclasses.replace(model.options, **options))


def test_each_layer_counts_and_only_while_asked_for():
    levels = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    config = networks.SMALL_UNET | levels | {"block_out_channels": (16,)}
    unet = UNet2DConditionModel(UNetConfig.from_dict(config))
    args = tuple(networks.unet_inputs(config)[name] for name in ("x", "t", "embeddings"))
    variables = drawn(unet, args)

    def output(*layers):
        with perturbed_attention(layers) if layers else contextlib.nullcontext():
            return np.asarray(unet.apply(variables, *args))

    chosen = ((), ("mid",), ("down_blocks.0",), ("mid", "up_blocks.0.attentions.1"))
    outputs = [output(*layers) for layers in chosen]
    assert all(error(a, b) > 100 * TOLERANCE for i, a in enumerate(outputs) for b in outputs[:i])
    np.testing.assert_array_equal(output(), outputs[0])  # afterwards it is as it was


def test_layers_that_are_not_there(tiny):
    for layer in ("mid_block.attentions.1", "middle"):
        model = with_options(tiny[0], pag_layers=(layer,))
        with pytest.raises(ArgumentError, match=rf"^pag_scale needs self-attention in {layer}, which this UNet"):
            jaxdiff.generate(model, tiny[1], "a castle", steps=1, pag_scale=2.0)


def test_the_models_own_scale_is_taken_where_none_is_given(tiny, tmp_path):
    model, params = tiny
    jaxdiff.save(tmp_path / "saved", with_options(model, pag_scale=4.0, pag_layers=("mid", "up")), params)
    opened = jaxdiff.load(tmp_path / "saved")
    assert (opened[0].options.pag_scale, opened[0].options.pag_layers) == (4.0, ("mid", "up"))
    own, given, none = (
        jaxdiff.generate(*opened, ["a castle", "an owl"], steps=2, **how)
        for how in ({}, {"pag_scale": [4.0, 0.0]}, {"pag_scale": 0})
    )
    np.testing.assert_array_equal(own[0], given[0])
    assert np.abs(own[1].astype(int) - given[1]).max() > 1
    assert np.abs(given[1].astype(int) - none[1]).max() <= 1  # another program
    jaxdiff.save(tmp_path / "without", model, params)
    assert not [key for key in json.loads((tmp_path / "without" / "model_index.json").read_text()) if "pag" in key]


@pytest.mark.parametrize("value", [-1.0, np.nan, [1.0, 2.0, 3.0]])
def test_scales_that_are_none(tiny, value):
    with pytest.raises(ArgumentError, match=r"^pag_scale "):
        jaxdiff.generate(*tiny, ["a castle", "an owl"], steps=1, pag_scale=value)


@pytest.mark.parametrize(
    "values",
    [{"_pag_scale": "3"}, {"_pag_scale": None}, {"_pag_scale": -1}, {"_pag_scale": True}, {"_pag_layers": "mid"},
     {"_pag_layers": []}, {"_pag_layers": [1]}],
)  # fmt: skip
def test_settings_of_a_model_that_are_none(values):
    with pytest.raises(ConfigError, match=next(iter(values))):
        PipelineOptions.from_dict(values)


def test_an_image_holds_the_scale_that_it_was_drawn_with(tiny, sample_cli):
    jaxdiff.save("own", with_options(tiny[0], pag_scale=4.0), tiny[1])
    for flags, scale in ((), 4.0), (("--pag_scale=0",), 0.0), (("--pag_scale=1.5",), 1.5):
        assert (
            sample_cli("--prompt=a castle", "--steps=1", "--output=a.png", "--overwrite", *flags, model="own")[0] == 0
        )
        assert read_metadata("a.png").get("pag_scale") == scale
    code, _, err = sample_cli("--prompt=a castle", "--pag_scale=-1", model="own")
    assert code == 2
    assert "--pag_scale" in err
