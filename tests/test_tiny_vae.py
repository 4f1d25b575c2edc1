"""The tiny autoencoder against diffusers' on the same weights, its previews, and its scaling conventions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.config import TinyVAEConfig
from jaxdiff.errors import WeightsError
from jaxdiff.io.modules import save_module
from jaxdiff.io.vae import load_tiny_vae
from jaxdiff.models.model import decode, encode
from jaxdiff.models.tiny_vae import AutoencoderTiny
from tests.support import networks
from tests.support.comparison import TOLERANCE, drawn, error

CONFIGS = {  # name -> config
    "published": {},  # the sizes of every published one; 2.4 million parameters
    "small": {
        "encoder_block_out_channels": (16, 16, 16),
        "decoder_block_out_channels": (16, 16, 16),
        "num_encoder_blocks": (1, 2, 1),
        "num_decoder_blocks": (2, 1, 1),
        "act_fn": "gelu",
        "latent_channels": 16,
        "scaling_factor": 0.9,
        "shift_factor": 0.1,
    },
}


def made(name: str):
    """(module, its variables): every weight random."""
    module = AutoencoderTiny(TinyVAEConfig.from_dict(CONFIGS[name]))
    return module, drawn(module, (jnp.zeros((1, 8, 8, 3)),))


@pytest.mark.parametrize("name", CONFIGS)
def test_tiny_autoencoder_equals_pytorch(name, tmp_path):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    from tests.support.oracle import drawn as draw_theirs
    from tests.support.oracle import nchw, nhwc

    theirs = draw_theirs(diffusers.AutoencoderTiny(**CONFIGS[name]))
    theirs.save_pretrained(tmp_path)
    tiny, params = load_tiny_vae(tmp_path)
    images = networks.uniform_images(2, 32, 24, 3)
    latents, logvar = jax.jit(lambda p, x: tiny.apply({"params": p}, x, method="encode"))(params, images)
    decoded = jax.jit(lambda p, z: tiny.apply({"params": p}, z, method="decode"))(params, latents)
    with torch.no_grad():
        expected = theirs.encode(nchw(images)).latents
        pictures = theirs.decode(nchw(latents)).sample
    assert error(latents, nhwc(expected)) < TOLERANCE
    assert error(decoded, nhwc(pictures)) < TOLERANCE
    assert np.all(np.exp(logvar) == 0)


def test_pytorch_opens_what_was_saved(tmp_path):
    pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    module, variables = made("small")
    save_module(tmp_path / "a", module, variables["params"])
    diffusers.AutoencoderTiny.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    again, params = load_tiny_vae(tmp_path / "b")
    assert again == module
    jax.tree.map(np.testing.assert_array_equal, params, variables["params"])


def authors(torch, width: int = 8, latents: int = 4):
    """(encoder, decoder) as the author of TAESD writes them, of two levels."""
    nn = torch.nn

    def conv(i, o, **kwargs):
        return nn.Conv2d(i, o, 3, padding=1, **kwargs)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            convs = [conv(width, width) for _ in range(3)]
            self.conv = nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), convs[2])

        def forward(self, x):
            return nn.functional.relu(self.conv(x) + x)

    class Clamp(nn.Module):
        def forward(self, x):
            return torch.tanh(x / 3) * 3

    narrow = conv(width, width, stride=2, bias=False)
    encoder = nn.Sequential(conv(3, width), Block(), narrow, Block(), Block(), conv(width, latents))
    wide = [nn.Upsample(scale_factor=2), conv(width, width, bias=False)]
    decoder = nn.Sequential(Clamp(), conv(latents, width), nn.ReLU(), Block(), *wide, Block(), conv(width, 3))
    return encoder, decoder


def test_the_authors_files_open_and_go_on_as_a_folder(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    from tests.support.oracle import nchw, nhwc

    torch.manual_seed(0)
    pair = dict(zip(("encoder", "decoder"), authors(torch), strict=True))
    for part, net in pair.items():
        save_file(net.state_dict(), tmp_path / f"taesd_{part}.safetensors")
        torch.save(net.state_dict(), tmp_path / f"taesd_{part}.pth")
    tiny, params = load_tiny_vae(tmp_path / "taesd_decoder.safetensors")
    assert tiny.config.num_encoder_blocks == (1, 2)
    assert tiny.config.num_decoder_blocks == (1, 1)
    other, same = load_tiny_vae(tmp_path / "taesd_encoder.pth")
    assert other == tiny
    jax.tree.map(np.testing.assert_array_equal, same, params)
    images = networks.uniform_images(2, 8, 6, 3)
    latents = jax.jit(lambda p, x: tiny.apply({"params": p}, x, method="encode")[0])(params, images)
    decoded = jax.jit(lambda p, z: tiny.apply({"params": p}, z, method="decode"))(params, latents)
    with torch.no_grad():
        assert error(latents, nhwc(pair["encoder"](nchw(images / 2 + 0.5)))) < TOLERANCE
        expected = nhwc(pair["decoder"](nchw(np.asarray(latents))))
    assert error(decoded / 2 + 0.5, expected) < TOLERANCE
    save_module(tmp_path / "folder", tiny, params)
    again, read = load_tiny_vae(tmp_path / "folder")
    assert again == tiny
    jax.tree.map(np.testing.assert_array_equal, read, params)
    (tmp_path / "taesd_encoder.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"taesd_decoder\.safetensors is the decoder .*: put the encoder beside it"):
        load_tiny_vae(tmp_path / "taesd_decoder.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "taesd_encoder.safetensors")
    with pytest.raises(WeightsError, match=r"taesd_encoder\.safetensors is not the encoder of a tiny autoencoder that"):
        load_tiny_vae(tmp_path / "taesd_decoder.safetensors")


def test_previews_take_the_unets_latents(tiny):
    """Scaled and shifted back, decoded, and brought from [-1, 1] to [0, 1]."""
    module, variables = made("small")
    latents = np.random.default_rng(0).standard_normal((2, 3, 5, 16)).astype(np.float32)
    images = decode(dataclasses.replace(tiny[0], vae=module), {"vae": variables["params"]}, latents)
    expected = module.apply(variables, latents / 0.9 + 0.1, method="decode") / 2 + 0.5
    assert images.shape == (2, 12, 20, 3)
    assert images.dtype == np.float32
    np.testing.assert_allclose(images, np.clip(expected, 0, 1), atol=1e-6)
    assert 0 < np.mean(images) < 1


@pytest.mark.slow
def test_it_takes_the_place_of_a_models_autoencoder(tiny):
    """The same methods, so that `encode` and `decode` of a model work with it; drawn latents are its mean."""
    model, params = tiny
    config = dataclasses.replace(TinyVAEConfig.from_dict(CONFIGS["small"]), latent_channels=4)
    module = AutoencoderTiny(config)
    own = module.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    model, params = dataclasses.replace(model, vae=module), {**params, "vae": own}
    images = networks.uniform_images(1, 16, 16, 3) / 2 + 0.5
    latents = encode(model, params, images)
    np.testing.assert_array_equal(latents, encode(model, params, images, jax.random.key(1)))
    assert decode(model, params, latents).shape == images.shape
