"""CLIP's text and vision encoders (Radford et al. 2021), laid out as in transformers."""

from typing import NamedTuple

import jax.numpy as jnp
from flax import linen as nn

from jaxdiff.config import CLIPTextConfig, CLIPVisionConfig, ConfigError
from jaxdiff.models.attention import attention
from jaxdiff.models.layers import ACTIVATIONS, rematerialised
from jaxdiff.typing import Array

# Of the pixels in [0, 1] that CLIP was trained on, by channel: the vision encoder's input is normalised by them.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class TextOutput(NamedTuple):
    last_hidden_state: Array  # [B, L, D], after the final norm; of an earlier layer with `clip_skip`
    pooled: Array  # [B, D], the last layer's normed state at the end-of-text token
    projected: Array | None  # [B, P], `pooled` through text_projection if the model has one
    hidden_states: tuple[Array, ...]  # layers + 1 of [B, L, D], before the final norm; [0] is the embedding


class CLIPLayer(nn.Module):
    """A pre-norm transformer layer."""

    config: CLIPTextConfig | CLIPVisionConfig
    causal: bool
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c, dtype, width = self.config, self.dtype, self.config.hidden_size
        h = nn.LayerNorm(epsilon=c.layer_norm_eps, dtype=dtype, name="layer_norm1")(x)
        q, k, v = (nn.Dense(width, dtype=dtype, name=f"self_attn_{n}_proj")(h) for n in "qkv")
        h = attention(q, k, v, c.num_attention_heads, causal=self.causal)
        x = x + nn.Dense(width, dtype=dtype, name="self_attn_out_proj")(h)
        h = nn.LayerNorm(epsilon=c.layer_norm_eps, dtype=dtype, name="layer_norm2")(x)
        h = ACTIVATIONS[c.hidden_act](nn.Dense(c.intermediate_size, dtype=dtype, name="mlp_fc1")(h))
        return x + nn.Dense(width, dtype=dtype, name="mlp_fc2")(h)


class CLIPEncoder(nn.Module):
    """The stack of layers; returns the input and every layer's output."""

    config: CLIPTextConfig | CLIPVisionConfig
    causal: bool
    remat: bool | str = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, ...]:
        if self.config.hidden_act not in ACTIVATIONS:
            raise ConfigError(f"hidden_act {self.config.hidden_act!r} is unknown; known are {', '.join(ACTIVATIONS)}.")
        cls = rematerialised(CLIPLayer, self.remat)
        states = [x]
        for i in range(self.config.num_hidden_layers):
            states.append(cls(self.config, self.causal, self.dtype, name=f"layers_{i}")(states[-1]))
        return tuple(states)


class CLIPTextModel(nn.Module):
    """Token ids to one vector each, with causal attention."""

    config: CLIPTextConfig
    remat: bool | str = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens: Array, clip_skip: int = 0) -> TextOutput:
        """tokens [B, L] int32, L at most max_position_embeddings; clip_skip: last layers to skip."""
        c, dtype = self.config, self.dtype
        init = nn.initializers.normal(0.02)
        if tokens.shape[1] > c.max_position_embeddings:
            raise ValueError(
                f"tokens has shape {list(tokens.shape)}, this text encoder has {c.max_position_embeddings} positions."
            )

        def embed(count, name):
            return nn.Embed(count, c.hidden_size, embedding_init=init, dtype=dtype, name=f"embeddings_{name}_embedding")

        x = embed(c.vocab_size, "token")(tokens)
        x = x + embed(c.max_position_embeddings, "position")(jnp.arange(tokens.shape[1]))[None]
        states = CLIPEncoder(c, True, self.remat, dtype, name="encoder")(x)
        norm = nn.LayerNorm(epsilon=c.layer_norm_eps, dtype=dtype, name="final_layer_norm")
        last = norm(states[-1])
        # In old configs eos_token_id is 2, which no tokenizer produces; the end is then the highest id of the row.
        ends = tokens if c.eos_token_id == 2 else tokens == c.eos_token_id
        pooled = last[jnp.arange(len(tokens)), jnp.argmax(ends, -1)]
        projected = None
        if c.with_projection:
            projected = nn.Dense(c.projection_dim, use_bias=False, dtype=dtype, name="text_projection")(pooled)
        return TextOutput(norm(states[-1 - clip_skip]) if clip_skip else last, pooled, projected, states)


class CLIPVisionModel(nn.Module):
    """Images to one vector each in the space shared with the text (Dosovitskiy et al. 2021)."""

    config: CLIPVisionConfig
    remat: bool | str = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, pixels: Array) -> Array:
        """pixels [B, S, S, 3], normalised by CLIP_MEAN and CLIP_STD, S = image_size -> [B, projection_dim]."""
        c, dtype, patch = self.config, self.dtype, (self.config.patch_size,) * 2
        init = nn.initializers.normal(0.02)
        embed = nn.Conv(
            c.hidden_size, patch, patch, "VALID", use_bias=False, dtype=dtype, name="embeddings_patch_embedding"
        )
        x = embed(pixels.astype(dtype)).reshape(pixels.shape[0], -1, c.hidden_size)
        cls = self.param("embeddings_class_embedding", init, (c.hidden_size,)).astype(dtype)
        x = jnp.concatenate([jnp.broadcast_to(cls, (len(x), 1, c.hidden_size)), x], 1)
        positions = nn.Embed(
            (c.image_size // c.patch_size) ** 2 + 1,
            c.hidden_size,
            embedding_init=init,
            dtype=dtype,
            name="embeddings_position_embedding",
        )
        x = x + positions(jnp.arange(x.shape[1]))[None]
        x = nn.LayerNorm(epsilon=c.layer_norm_eps, dtype=dtype, name="pre_layrnorm")(x)
        x = CLIPEncoder(c, False, self.remat, dtype, name="encoder")(x)[-1][:, 0]
        x = nn.LayerNorm(epsilon=c.layer_norm_eps, dtype=dtype, name="post_layernorm")(x)
        return nn.Dense(c.projection_dim, use_bias=False, dtype=dtype, name="visual_projection")(x)
