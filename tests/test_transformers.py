"""The networks of the transformer families and their text encoders against PyTorch's, on the same random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxdiff.config import Flux2Config, FluxConfig, Qwen3Config, SD3Config, T5Config, ZImageConfig
from jaxdiff.io.torch_names import from_torch_layout, tensor_name
from jaxdiff.models.dit import fold, unfold
from jaxdiff.models.flux import FluxTransformer2DModel
from jaxdiff.models.flux2 import Flux2Transformer2DModel
from jaxdiff.models.qwen3 import Qwen3Model
from jaxdiff.models.sd3 import SD3Transformer2DModel
from jaxdiff.models.t5 import T5EncoderModel
from jaxdiff.models.z_image import ZImageTransformer2DModel

TIMES = np.array([700.0, 30.0], np.float32)
GUIDANCE = np.array([3.5, 2.0], np.float32)


def randomised(net, scale=0.05):
    """The network with every parameter drawn, so that none is zero or one; norms stay near one."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in net.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(1 + 0.1 * noise if p.ndim == 1 and "norm" in name and "weight" in name else scale * noise)
    return net.eval()


def params_of(module, net, *inputs):
    """PyTorch's weights as the module's parameters; every tensor has a place."""
    shapes = flatten_dict(jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs)["params"]))
    tensors = {name: x.detach().numpy() for name, x in net.state_dict().items()}
    tensors.pop("encoder.embed_tokens.weight", None)  # T5's second name for its embedding
    found = {path: from_torch_layout(path, tensors.pop(tensor_name(path))) for path in shapes}
    assert not tensors
    assert {path: x.shape for path, x in found.items()} == {path: s.shape for path, s in shapes.items()}
    return unflatten_dict({path: jnp.asarray(x) for path, x in found.items()})


def drawn(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def check(module, net, inputs, expected, tolerance=1e-5):
    params = params_of(module, net, *inputs)
    found = np.asarray(module.apply({"params": params}, *inputs))
    expected = expected.detach().numpy()
    assert found.shape == expected.shape
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(found, expected, atol=tolerance * np.abs(expected).max(), rtol=0)


def packed(x):
    """Latents [B, h, w, C] as FLUX's pipelines give them to the network."""
    from diffusers import FluxPipeline

    b, h, w, c = x.shape
    return FluxPipeline._pack_latents(torch.tensor(x).permute(0, 3, 1, 2), b, c, h, w)


def unpacked(tokens, x):
    from diffusers import FluxPipeline

    return FluxPipeline._unpack_latents(tokens, 8 * x.shape[1], 8 * x.shape[2], 8).permute(0, 2, 3, 1)


@pytest.mark.slow
@pytest.mark.parametrize("guided", [True, False])
def test_flux(guided):
    from diffusers import FluxPipeline
    from diffusers import FluxTransformer2DModel as Oracle

    sizes = {
        "in_channels": 16, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
        "joint_attention_dim": 24, "pooled_projection_dim": 20, "guidance_embeds": guided, "axes_dims_rope": (4, 6, 6),
    }  # fmt: skip
    net, x, text, pooled = randomised(Oracle(**sizes)), drawn(2, 6, 4, 4), drawn(2, 7, 24), drawn(2, 20)
    ids = FluxPipeline._prepare_latent_image_ids(2, 3, 2, "cpu", torch.float32)
    out = net(
        packed(x), torch.tensor(text), torch.tensor(pooled), torch.tensor(TIMES / 1000), ids, torch.zeros(7, 3),
        torch.tensor(GUIDANCE) if guided else None,
    ).sample  # fmt: skip
    inputs = (x, TIMES, text, pooled, None, GUIDANCE if guided else None)
    check(FluxTransformer2DModel(FluxConfig(**sizes)), net, inputs, unpacked(out, x))


@pytest.mark.parametrize("guided", [True, False])
def test_flux2(guided):
    from diffusers import Flux2KleinPipeline
    from diffusers import Flux2Transformer2DModel as Oracle

    sizes = {
        "in_channels": 16, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
        "joint_attention_dim": 24, "timestep_guidance_channels": 32, "axes_dims_rope": (4, 4, 4, 4),
        "guidance_embeds": guided,
    }  # fmt: skip
    net, x, text = randomised(Oracle(**sizes)), drawn(2, 6, 4, 4), drawn(2, 7, 24)
    ids = Flux2KleinPipeline._prepare_latent_ids(torch.zeros(2, 16, 3, 2))
    words = Flux2KleinPipeline._prepare_text_ids(torch.tensor(text))
    guidance = torch.tensor(GUIDANCE) if guided else None
    out = net(packed(x), torch.tensor(text), torch.tensor(TIMES / 1000), ids, words, guidance).sample
    inputs = (x, TIMES, text, None, None, GUIDANCE if guided else None)
    check(Flux2Transformer2DModel(Flux2Config(**sizes)), net, inputs, unpacked(out, x))


@pytest.mark.parametrize(("dual", "norm"), [((), None), ((0, 1), "rms_norm")], ids=["3", "3.5"])
def test_sd3(dual, norm):
    from diffusers import SD3Transformer2DModel as Oracle

    sizes = {
        "sample_size": 16, "in_channels": 4, "num_layers": 3, "attention_head_dim": 8, "num_attention_heads": 4,
        "joint_attention_dim": 24, "caption_projection_dim": 32, "pooled_projection_dim": 20, "out_channels": 4,
        "pos_embed_max_size": 12, "dual_attention_layers": dual, "qk_norm": norm,
    }  # fmt: skip
    net, x, text, pooled = randomised(Oracle(**sizes)), drawn(2, 6, 4, 4), drawn(2, 7, 24), drawn(2, 20)
    out = net(torch.tensor(x).permute(0, 3, 1, 2), *map(torch.tensor, (text, pooled, TIMES))).sample
    check(SD3Transformer2DModel(SD3Config(**sizes)), net, (x, TIMES, text, pooled), out.permute(0, 2, 3, 1))


@pytest.mark.slow
@pytest.mark.parametrize("size", [(6, 4), (8, 16)], ids=["filled", "whole"])
def test_z_image(size):
    from diffusers import ZImageTransformer2DModel as Oracle

    sizes = {
        "in_channels": 4, "dim": 48, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 3, "n_kv_heads": 3,
        "cap_feat_dim": 24, "axes_dims": [4, 6, 6], "axes_lens": [200, 32, 32],
    }  # fmt: skip
    net, x, text = randomised(Oracle(**sizes)), drawn(2, *size, 4), drawn(2, 70, 24)
    lengths = (5, 64)  # of the prompts: the first is filled up to 32, and the batch adds as much again
    mask = (np.arange(70)[None] < np.array(lengths)[:, None]).astype(np.float32)
    latents = [torch.tensor(image).permute(2, 0, 1)[:, None] for image in x]
    prompts = [torch.tensor(rows[:n]) for rows, n in zip(text, lengths, strict=True)]
    out = net(latents, torch.tensor((1000 - TIMES) / 1000), prompts, return_dict=False)[0]
    expected = -torch.stack(list(out)).squeeze(2).permute(0, 2, 3, 1)
    check(ZImageTransformer2DModel(ZImageConfig.from_dict(sizes)), net, (x, TIMES, text, None, mask), expected)


def test_t5():
    from transformers import T5Config as OracleConfig
    from transformers import T5EncoderModel as Oracle

    sizes = {
        "vocab_size": 100, "d_model": 24, "d_kv": 8, "d_ff": 40, "num_layers": 3, "num_heads": 4,
        "feed_forward_proj": "gated-gelu",
    }  # fmt: skip
    net = randomised(Oracle(OracleConfig(**sizes)), 0.3)
    tokens = np.random.default_rng(0).integers(0, 100, (2, 200))  # more than the distances that are told apart
    out = net(torch.tensor(tokens)).last_hidden_state
    check(T5EncoderModel(T5Config(**sizes)), net, (tokens,), out, 1e-4)


def test_qwen3():
    from transformers import Qwen3Config as OracleConfig
    from transformers import Qwen3Model as Oracle

    sizes = {
        "vocab_size": 100, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    }  # fmt: skip
    config = OracleConfig(**sizes)
    net, module = randomised(Oracle(config), 0.3), Qwen3Model(Qwen3Config.from_dict(config.to_dict()))
    assert module.config.rope_theta == 1e6
    tokens, mask = np.random.default_rng(0).integers(0, 100, (2, 20)), np.ones((2, 20))
    mask[0, 9:] = 0
    out = net(torch.tensor(tokens), attention_mask=torch.tensor(mask), output_hidden_states=True)
    params = params_of(module, net, tokens)
    found = module.apply({"params": params}, tokens, mask, (1, 3))
    for state, layer in zip(found, (1, 3), strict=True):
        expected = out.hidden_states[layer].detach().numpy()
        np.testing.assert_allclose(state, expected, atol=1e-4 * np.abs(expected).max(), rtol=0)
    (last,) = module.apply({"params": params}, tokens, mask)
    expected = out.last_hidden_state.detach().numpy()
    np.testing.assert_allclose(last, expected, atol=1e-4 * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize("channels_first", [True, False])
def test_patches_unfold_to_what_was_folded(channels_first):
    x = drawn(2, 6, 4, 3)
    patches = fold(x, channels_first=channels_first)
    assert patches.shape == (2, 6, 12)
    order = x[0, :2, :2].transpose(2, 0, 1) if channels_first else x[0, :2, :2]
    np.testing.assert_array_equal(patches[0, 0], order.ravel())
    np.testing.assert_array_equal(unfold(patches, 6, 4, channels_first=channels_first), x)
    with pytest.raises(ValueError, match="5 x 4"):
        fold(x[:, :5], channels_first=channels_first)
