"""Text-to-image diffusion in pure JAX and Flax.

>>> import jaxdiff
>>> model, params = jaxdiff.load("icons")  # doctest: +SKIP
>>> images = jaxdiff.generate(model, params, ["a castle"], seed=0)  # doctest: +SKIP
"""

from jaxdiff.diffusion.base import Scheduler
from jaxdiff.diffusion.sampling_loop import sample
from jaxdiff.diffusion.schedulers import SCHEDULERS, get_scheduler
from jaxdiff.diffusion.schedules import Time
from jaxdiff.diffusion.times import time_grid
from jaxdiff.io.controlnet import load_controlnet
from jaxdiff.io.lora import load_lora, merge_lora, read_lora, save_lora
from jaxdiff.io.pretrained import load, save
from jaxdiff.io.textual_inversion import load_textual_inversion, save_textual_inversion
from jaxdiff.io.upscaler import load_upscaler, save_upscaler
from jaxdiff.io.vae import load_vae
from jaxdiff.models.conditioning import Conditioning
from jaxdiff.models.model import Model, decode, encode, with_controlnets, with_upscaler
from jaxdiff.models.text_encoding import encode_text
from jaxdiff.parallel import replicate, shard
from jaxdiff.sampling.denoiser import denoiser
from jaxdiff.sampling.generate import generate
from jaxdiff.sampling.noise import initial_noise
from jaxdiff.sampling.texts import tokenize
from jaxdiff.sampling.upscale import upscale
from jaxdiff.version import __version__

__all__ = [
    "SCHEDULERS",
    "Conditioning",
    "Model",
    "Scheduler",
    "Time",
    "__version__",
    "decode",
    "denoiser",
    "encode",
    "encode_text",
    "generate",
    "get_scheduler",
    "initial_noise",
    "load",
    "load_controlnet",
    "load_lora",
    "load_textual_inversion",
    "load_upscaler",
    "load_vae",
    "merge_lora",
    "read_lora",
    "replicate",
    "sample",
    "save",
    "save_lora",
    "save_textual_inversion",
    "save_upscaler",
    "shard",
    "time_grid",
    "tokenize",
    "upscale",
    "with_controlnets",
    "with_upscaler",
]
