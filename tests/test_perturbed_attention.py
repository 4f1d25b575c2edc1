"""Perturbed-attention guidance against PyTorch diffusers' pipelines, on the same weights."""

import dataclasses
import json

import numpy as np
import pytest

import jaxdiff
from jaxdiff.errors import ArgumentError, ConfigError
from jaxdiff.models.perturbed import perturbed_attention
from tests.support.tiny import SIDE

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
PROMPTS = ["a castle", "an owl at night"]


def with_layers(model, *layers, scale=0.0):
    options = dataclasses.replace(model.options, pag_layers=layers, pag_scale=scale)
    return dataclasses.replace(model, options=options)


@pytest.mark.parametrize(
    ("family", "cls"), [("sd1", "StableDiffusionPAGPipeline"), ("sdxl", "StableDiffusionXLPAGPipeline")]
)
@pytest.mark.parametrize("layers", [("mid",), ("down_blocks.1", "mid", "up_blocks.0")])
def test_images_are_diffusers(family, cls, layers):
    pytest.fail("written below")
