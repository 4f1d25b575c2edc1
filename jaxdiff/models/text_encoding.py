"""Encoding token ids to the conditioning of the denoising network, for each family."""

from collections.abc import Callable

import jax.numpy as jnp

from jaxdiff.models.conditioning import Conditioning, encode_chunks
from jaxdiff.models.model import Model, apply
from jaxdiff.text.chunks import Tokens
from jaxdiff.text.emphasis import apply_emphasis
from jaxdiff.typing import Array, Params

FLUX2_LAYERS = (9, 18, 27)  # of Qwen3: FLUX.2 reads their states side by side


def encode_text(model: Model, params: Params, tokens: Tokens | Array, *, clip_skip: int = 0) -> Conditioning:
    """Token ids to the conditioning of the denoising network.

    SD 1.x and 2.x use the last hidden state of their encoder after the final norm. SDXL uses the penultimate states,
    without the norm, of its two encoders side by side, and the refiner those of its only encoder; their pooled text is
    the last encoder's projection of the first chunk (Podell et al. 2023, section 2.1). See the functions below for the
    transformer families.

    Args:
        tokens: as `tokenize` returns them: `Tokens`, or for a model with one encoder token ids, int32 [B, K L] in K
            chunks.
        clip_skip: last layers of the CLIP encoders to skip, at least 0; 0 for FLUX.1, FLUX.2 and Z-Image.

    Returns:
        embeddings [B, K L, D], the tokens' attention mask [B, K L] or None and, for SDXL, pooled [B, P]; no time ids.

    Raises:
        ValueError: `clip_skip` is out of range, or `tokens` lack the ids of the second encoder.
    """
    tokens = tokens if isinstance(tokens, Tokens) else Tokens(tokens)
    if model.transformer is not None:
        check_clip_skip(model, clip_skip)
        return ENCODERS[model.family](model, params, tokens, clip_skip)
    inputs = ((tokens.ids, tokens.weights), (tokens.ids_2, tokens.weights_2))
    names = [n for n in ("text_encoder", "text_encoder_2") if n in model.modules]
    sdxl = names[-1] == "text_encoder_2"  # or its refiner
    embeddings, pooled = [], None
    for name, (ids, weights) in zip(names, inputs, strict=False):
        if ids is None:
            raise ValueError("tokens are for one text encoder, this model has two: make them with jaxdiff.tokenize.")
        encoder, tokenizer = model.modules[name], model.tokenizer if name == "text_encoder" else model.tokenizer_2
        length = encoder.config.max_position_embeddings if tokenizer is None else tokenizer.max_length
        states, pooled = encode_chunks(encoder, params[name], ids, length, clip_skip, sdxl)
        embeddings.append(apply_emphasis(states, weights, length))
    cond = Conditioning(jnp.concatenate(embeddings, -1), pooled if sdxl else None, None, tokens.attention_mask)
    if tokens.zeros is None:
        return cond
    zeros = jnp.asarray(tokens.zeros)
    return cond._replace(
        embeddings=jnp.where(zeros[:, None, None], 0, cond.embeddings),
        pooled=None if cond.pooled is None else jnp.where(zeros[:, None], 0, cond.pooled),
    )


def check_clip_skip(model: Model, clip_skip: int) -> None:
    """Raise ValueError for a `clip_skip` that a transformer family does not read, or that leaves no layer."""
    limit = 0
    if model.family == "sd3":
        limit = min(encoder.config.num_hidden_layers for encoder in (model.text_encoder, model.text_encoder_2)) - 1
    if not 0 <= clip_skip <= limit:
        raise ValueError(
            f"clip_skip {clip_skip} must be 0{f' to {limit}' if limit else ''} for models like {model.family}."
        )


def encode_flux(model: Model, params: Params, tokens: Tokens, clip_skip: int) -> Conditioning:
    """FLUX.1: T5's states, and CLIP's pooled state after the final norm."""
    text = apply(model, params, "text_encoder_2", tokens.ids_2)
    return Conditioning(text, apply(model, params, "text_encoder", tokens.ids).pooled)


def encode_sd3(model: Model, params: Params, tokens: Tokens, clip_skip: int) -> Conditioning:
    """SD 3: the penultimate states of both CLIPs side by side, zero-padded to T5's width, followed by T5's states.

    Without T5 its states are zeros (Esser et al. 2024, section B.3).
    """
    clips = [
        apply(model, params, "text_encoder", tokens.ids),
        apply(model, params, "text_encoder_2", tokens.ids_2),
    ]
    pooled = jnp.concatenate([clip.projected for clip in clips], -1)
    states = jnp.concatenate([clip.hidden_states[-2 - clip_skip] for clip in clips], -1)
    width = model.transformer.config.joint_attention_dim
    states = jnp.pad(states, ((0, 0), (0, 0), (0, width - states.shape[-1])))
    if model.text_encoder_3 is None:
        text = jnp.zeros((len(states), model.options.max_sequence_length, width), states.dtype)
    else:
        text = apply(model, params, "text_encoder_3", tokens.ids_3)
    return Conditioning(jnp.concatenate([states, text], 1), pooled)


def encode_z_image(model: Model, params: Params, tokens: Tokens, clip_skip: int) -> Conditioning:
    """Z-Image: Qwen3's penultimate states of the prompt's tokens without padding."""
    layer = model.text_encoder.config.num_hidden_layers - 1
    (text,) = apply(model, params, "text_encoder", tokens.ids, tokens.attention_mask, (layer,))
    return Conditioning(text, attention_mask=tokens.attention_mask)


def encode_flux2(model: Model, params: Params, tokens: Tokens, clip_skip: int) -> Conditioning:
    """FLUX.2: the states of three Qwen3 layers side by side; Qwen3 masks padding, the transformer does not."""
    states = apply(model, params, "text_encoder", tokens.ids, tokens.attention_mask, FLUX2_LAYERS)
    return Conditioning(jnp.concatenate(states, -1))


ENCODERS: dict[str, Callable[[Model, Params, Tokens, int], Conditioning]] = {
    "flux": encode_flux,
    "sd3": encode_sd3,
    "z_image": encode_z_image,
    "flux2": encode_flux2,
}
