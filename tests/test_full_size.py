"""Stable Diffusion 1.5's real shapes, with random weights, against PyTorch: minutes and some twelve gigabytes."""

import resource

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.config import CLIPTextConfig, UNetConfig, VAEConfig
from jaxdiff.io.tensor_files import load_tensors
from jaxdiff.models.clip import CLIPTextModel
from jaxdiff.models.unet import UNet2DConditionModel
from jaxdiff.models.vae import AutoencoderKL
from tests.support.comparison import error, shapes_of

pytestmark = pytest.mark.slow
TOLERANCE = 1e-4  # what a user of a checkpoint would not notice; measured are about 1e-6


@pytest.fixture(scope="module")
def sd15():
    pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    from benchmarks import sd15

    return sd15


def loaded(module, weights, args):
    shapes = shapes_of(module, args)
    return {"params": load_tensors(weights, shapes, jnp.float32)}, sum(x.size for x in jax.tree.leaves(shapes))


def report(name: str, parameters: int, value: float) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(
        f"{name}: {parameters / 1e6:.0f} M parameters, relative L2 error {value:.1e}, peak {peak:.1f} GB with PyTorch's"
    )


def test_unet(sd15, tmp_path):
    import torch

    reference, weights = sd15.make("unet", tmp_path)
    rng = np.random.default_rng(0)
    args = (
        rng.standard_normal((2, 64, 64, 4), np.float32),
        jnp.float32(501),
        rng.standard_normal((2, 77, 768), np.float32),
    )
    unet = UNet2DConditionModel(UNetConfig.load(tmp_path / "config.json"))
    variables, parameters = loaded(unet, weights, args)
    with torch.no_grad():
        x = torch.from_numpy(args[0].transpose(0, 3, 1, 2).copy())
        theirs = reference(x, torch.tensor(501.0), torch.from_numpy(args[2])).sample.numpy().transpose(0, 2, 3, 1)
    found = error(jax.jit(unet.apply)(variables, *args), theirs)
    report("UNet", parameters, found)
    assert 855e6 < parameters < 865e6
    assert found < TOLERANCE


def test_vae(sd15, tmp_path):
    import torch

    reference, weights = sd15.make("vae", tmp_path)
    images = np.random.default_rng(0).uniform(-1, 1, (1, 512, 512, 3)).astype(np.float32)
    vae = AutoencoderKL(VAEConfig.load(tmp_path / "config.json"))
    variables, parameters = loaded(vae, weights, (images,))
    with torch.no_grad():
        mean = reference.encode(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).latent_dist.mean
        decoded = reference.decode(mean).sample
    ours = jax.jit(lambda v, x: vae.apply(v, x, method="encode")[0])(variables, images)
    encoding = error(ours, mean.numpy().transpose(0, 2, 3, 1))
    image = jax.jit(lambda v, z: vae.apply(v, z, method="decode"))(variables, mean.numpy().transpose(0, 2, 3, 1))
    decoding = error(image, decoded.numpy().transpose(0, 2, 3, 1))
    report("VAE encoder", parameters, encoding)
    report("VAE decoder", parameters, decoding)
    assert 83e6 < parameters < 85e6
    assert max(encoding, decoding) < TOLERANCE


def test_text_encoder(sd15, tmp_path):
    import torch

    reference, weights = sd15.make("text_encoder", tmp_path)
    tokens = np.array([sd15.TOKENS], np.int32)
    text = CLIPTextModel(CLIPTextConfig.load(tmp_path / "config.json"))
    variables, parameters = loaded(text, weights, (tokens,))
    with torch.no_grad():
        theirs = reference(torch.from_numpy(tokens).long()).last_hidden_state.numpy()
    found = error(jax.jit(text.apply)(variables, tokens).last_hidden_state, theirs)
    report("text encoder", parameters, found)
    assert 122e6 < parameters < 124e6
    assert found < TOLERANCE
