"""The conditioning of the denoising network: hidden states of the text encoders, computed in chunks."""

from typing import Any, NamedTuple

from jaxdiff.models.clip import CLIPTextModel
from jaxdiff.typing import Array, Params


class Conditioning(NamedTuple):
    """The denoising network's inputs from the prompt."""

    embeddings: Array  # [B, L, D]
    pooled: Array | None = None  # [B, P], SDXL
    time_ids: Array | None = None  # [B, 6], SDXL: original height and width, crop top and left, target height and width
    attention_mask: Array | None = None  # [B, L] in [0, 1], the weight of each token; None: all ones


def encode_chunks(
    encoder: CLIPTextModel, params: Params, ids: Array, length: int, clip_skip: int, sdxl: bool
) -> tuple[Array, Array | None]:
    """Hidden states [B, K L, D] of ids [B, K L], each chunk encoded alone, and the first chunks' projected text [B, P].

    Args:
        params: the encoder's own.
        length: L, tokens of a chunk.
        clip_skip, sdxl: which layer's states, see `encode_text`.
    """
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
