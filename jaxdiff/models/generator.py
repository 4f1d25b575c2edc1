"""The generator of a text-conditional GAN: noise and text to latents in one step."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxdiff.config import GeneratorConfig
from jaxdiff.models.discriminator import leaky
from jaxdiff.models.layers import Attention, conv, rematerialised
from jaxdiff.models.unet import score_bias
from jaxdiff.typing import Array


def text_state(context: Array, mask: Array | None = None) -> Array:
    """The mean [B, D] of a text's states [B, L, D], weighted by `mask` [B, L]."""
    context = context.astype(jnp.promote_types(context.dtype, jnp.float32))
    if mask is None:
        return context.mean(1)
    return (context * mask[..., None]).sum(1) / jnp.maximum(mask.sum(1), 1e-6)[:, None]


class GeneratorBlock(nn.Module):
    """x plus two 3x3 convolutions without norms, whose input channels the style scales; the second starts at zero.

    (Huang et al. 2024, section 3.3; the scales are those of Karras et al. 2019, equation 1, without the norm.)
    """

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, style: Array) -> Array:
        """x [B, H, W, C], style [B, S] -> [B, H, W, C]."""

        def scaled(h: Array, name: str) -> Array:
            scale = nn.Dense(h.shape[-1], dtype=self.dtype, name=name)(style)
            return leaky(h * (1 + scale[:, None, None]))

        h = conv(x.shape[-1], self.dtype, "conv1")(scaled(x, "style1"))
        return x + conv(x.shape[-1], self.dtype, "conv2", zero=True)(scaled(h, "style2"))


class TextAttention(nn.Module):
    """x plus cross-attention to the text; only the queries are normalised."""

    heads: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, context: Array, bias: Array | None = None) -> Array:
        """x [B, H, W, C], context [B, L, D], bias [B, L] of the scores of its tokens or None -> [B, H, W, C]."""
        queries = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name="norm")(x.reshape(len(x), -1, x.shape[-1]))
        return x + Attention(self.heads, dtype=self.dtype, name="attn")(queries, context, bias).reshape(x.shape)


class TextConditionalGenerator(nn.Module):
    """Residual blocks without norms, from a learned 4 x 4 basis upwards (Huang et al. 2024, section 3.3 and appendix).

    Noise and the mean of the text's states form a style, which scales the basis and the channels of each block; below
    full resolution the positions also attend to the text. The arguments are a UNet's, so that it can replace one.
    """

    config: GeneratorConfig
    remat: bool | str = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Array,
        t: Array | None,
        context: Array,
        pooled: Array | None = None,
        time_ids: Array | None = None,
        mask: Array | None = None,
        *unused: None,
    ) -> Array:
        """Unit Gaussian noise x [B, h, w, C] and the text's states [B, L, D] -> latents [B, h, w, C] float32.

        Args:
            mask: [B, L] in [0, 1], weight of each token; None: 1 for all.
            t, pooled, time_ids, unused: a UNet's other arguments; not read.
        """
        c, batch = self.config, len(x)
        last = c.block_out_channels[-1]
        noise = nn.Dense(c.noise_dim, use_bias=False, dtype=self.dtype, name="noise_proj")(x.reshape(batch, -1))
        text = nn.Dense(c.style_dim, dtype=self.dtype, name="text_proj")(text_state(context, mask))
        style = leaky(nn.Dense(c.style_dim, dtype=self.dtype, name="linear_1")(jnp.concatenate([noise, text], -1)))
        style = leaky(nn.Dense(c.style_dim, dtype=self.dtype, name="linear_2")(style))
        side = c.sample_size // 2 ** (len(c.block_out_channels) - 1)
        basis = self.param("basis", nn.initializers.normal(1.0), (side, side, last))
        h = nn.Dense(last, dtype=self.dtype, name="basis_proj")(style)[:, None, None] * basis.astype(self.dtype)
        bias = None if mask is None else score_bias(mask)
        block = rematerialised(GeneratorBlock, self.remat)
        for i, width in enumerate(reversed(c.block_out_channels)):
            if i:
                h = conv(width, self.dtype, f"upsamplers_{i}", size=1, padding=0)(h)
                h = jax.image.resize(h, (batch, 2 * h.shape[1], 2 * h.shape[2], width), "bilinear")
            for j in range(c.layers_per_block):
                index = i * c.layers_per_block + j
                h = block(self.dtype, name=f"blocks_{index}")(h, style)
                if i < len(c.block_out_channels) - 1:
                    h = TextAttention(c.num_attention_heads, self.dtype, name=f"attentions_{index}")(h, context, bias)
        h = conv(c.in_channels, self.dtype, "conv_out")(leaky(h))
        return h.astype(jnp.promote_types(h.dtype, jnp.float32))
