"""Token ids to what the UNet is told of a prompt: one encoder or two, chunks, emphasis, skipped layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp

from jaxdiff.models.clip import CLIPTextModel
from jaxdiff.text.chunks import Tokens
from jaxdiff.text.emphasis import emphasise
from jaxdiff.typing import Array, Params

if TYPE_CHECKING:
    from jaxdiff.models.model import Model


class Conditioning(NamedTuple):
    """What the UNet is told of the prompt."""

    embeddings: Array  # [B, L, D]
    pooled: Array | None = None  # [B, P], SDXL
    time_ids: Array | None = None  # [B, 6], SDXL: original height and width, crop top and left, target height and width
    attention_mask: Array | None = None  # [B, L] in [0, 1], how much each token counts; None: all in full


def encode_text(model: Model, params: Params, tokens: Tokens | Array, *, clip_skip: int = 0) -> Conditioning:
    """Token ids -> what the UNet attends to.

    One encoder (SD 1.x, 2.x) gives its last hidden state after the final norm. SDXL takes the state before the last,
    without the norm, of its two encoders side by side, and the refiner that of its only one; their pooled text is the
    last encoder's projection of the first chunk (Podell et al. 2023, section 2.1).

    Args:
        tokens: `Tokens`; for a model of one encoder also plain ids, int32 [B, L] or, in K chunks, [B, K L].
        clip_skip: through how many layers fewer than usual the text goes, at least 0.

    Returns:
        embeddings [B, K L, D], the tokens' attention mask and, for SDXL, pooled [B, P]; without time ids.

    Raises:
        ValueError: `clip_skip` is negative or leaves no layer; ids for one encoder where the model has two.
    """
    tokens = tokens if isinstance(tokens, Tokens) else Tokens(tokens)
    given = ((tokens.ids, tokens.weights), (tokens.ids_2, tokens.weights_2))
    names = [n for n in ("text_encoder", "text_encoder_2") if n in model.modules]
    sdxl = names[-1] == "text_encoder_2"  # or its refiner
    embeddings, pooled = [], None
    for name, (ids, weights) in zip(names, given, strict=False):
        if ids is None:
            raise ValueError("tokens are for one text encoder and this model has two: make them with jaxdiff.tokenize.")
        encoder, tokenizer = model.modules[name], model.tokenizer if name == "text_encoder" else model.tokenizer_2
        length = encoder.config.max_position_embeddings if tokenizer is None else tokenizer.max_length
        states, pooled = _encode(encoder, params[name], ids, length, clip_skip, sdxl)
        embeddings.append(emphasise(states, weights, length))
    cond = Conditioning(jnp.concatenate(embeddings, -1), pooled if sdxl else None, None, tokens.attention_mask)
    if tokens.zeros is None:
        return cond
    zeros = jnp.asarray(tokens.zeros)
    return cond._replace(
        embeddings=jnp.where(zeros[:, None, None], 0, cond.embeddings),
        pooled=None if cond.pooled is None else jnp.where(zeros[:, None], 0, cond.pooled),
    )


def _encode(
    encoder: CLIPTextModel, params: Params, ids: Array, length: int, clip_skip: int, sdxl: bool
) -> tuple[Array, Array | None]:
    """Hidden states [B, K L, D] and the first chunks' projected pooled text [B, P] of ids [B, K L]."""
    layers = encoder.config.num_hidden_layers
    if not 0 <= clip_skip <= layers - sdxl:
        raise ValueError(f"clip_skip {clip_skip} must be 0 to {layers - sdxl}: the text encoder has {layers} layers.")
    batch, total = ids.shape
    chunks = -(-total // length)
    if chunks > 1 and total != chunks * length:
        raise ValueError(f"{total} tokens are not a multiple of {length}, the length of a chunk.")
    output: Any = encoder.apply({"params": params}, ids.reshape(batch * chunks, -1), clip_skip=clip_skip)
    states = output.hidden_states[-2 - clip_skip] if sdxl else output.last_hidden_state
    projected = output.projected
    if projected is not None:
        projected = projected.reshape(batch, chunks, -1)[:, 0]
    return states.reshape(batch, total, -1), projected
