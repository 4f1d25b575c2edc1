"""How a gradient becomes an update: the optimizers, their moments' dtypes, and learning-rate multipliers."""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxdiff.parallel import path_name
from jaxdiff.training.ema import track
from jaxdiff.training.options import Options, OptionsError, check_pairs
from jaxdiff.typing import Array, Params

MIN_QUANTIZED = 4096  # elements: smaller arrays keep float32 moments (Dettmers et al. 2022, section 2)
LORA = "lora/"  # prefix of a LoRA's layers, "lora/unet.mid_block"
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")  # a model has one or more of them
MUON_RMS = 0.2  # RMS of a Muon update at learning rate 1, matching AdamW's (Liu et al. 2025, section 2.2)


def learning_rate(options: Options) -> optax.Schedule:
    """Linear warm-up, then constant, or linear or cosine decay to 0 (Loshchilov & Hutter 2017, equation 5)."""
    peak, warmup = options.learning_rate, options.warmup
    decay_steps = max(options.steps - warmup, 1)
    if options.schedule == "cosine":
        decay = optax.cosine_decay_schedule(peak, decay_steps)
    elif options.schedule == "linear":
        decay = optax.linear_schedule(peak, 0.0, decay_steps)
    else:
        decay = optax.constant_schedule(peak)
    return optax.join_schedules([optax.linear_schedule(0.0, peak, max(warmup, 1)), decay], [warmup])


def decay_mask(params: Params) -> Any:
    """The mask of weight decay: true for matrices and kernels, false for biases, norms and scalars.

    Also false for SD 3's position table, which is fixed.
    """
    return jax.tree_util.tree_map_with_path(lambda path, p: p.ndim > 1 and _leaf_name(path) != "pos_embed", params)


def _leaf_name(path: tuple) -> str:
    return getattr(path[-1], "key", "") if path else ""


def optimizer(options: Options) -> optax.GradientTransformation:
    """The optimizer of a stage; params["discriminator"], if present, gets one of its own.

    Each of the two clips, decays and counts separately. The discriminator's takes the `discriminator_*` options.
    """
    single, untracked = _optimizer(options), dataclasses.replace(options, ema_sigmas=())
    partitioned = optax.partition(
        {"discriminator": _optimizer(untracked.of_discriminator), "others": _optimizer(untracked)},
        lambda params: {name: name if name == "discriminator" else "others" for name in params},
    )
    partitioned = optax.chain(partitioned, track(options.ema_sigmas)) if options.ema_sigmas else partitioned

    def select(params: Params) -> optax.GradientTransformation:
        return partitioned if "discriminator" in params else single

    def update(updates: Params, state: Any, params: Params | None = None) -> tuple[Params, Any]:
        return select(updates).update(updates, state, params)

    return optax.GradientTransformation(lambda params: select(params).init(params), update)


def _optimizer(options: Options) -> optax.GradientTransformation:
    """The optimizer that `options.optimizer` names, with clipping, weight decay and learning-rate multipliers.

    AdamW (Loshchilov & Hutter 2019), Adafactor (Shazeer & Stern 2018, without momentum, at a given rate), Lion (Chen et
    al. 2023), or Muon for matrices and kernels with AdamW for the rest (Jordan et al. 2024).
    """
    clip = clip_by_global_norm(options.clip_norm) if options.clip_norm else optax.identity()
    rate, b1, b2, decay = learning_rate(options), options.b1, options.b2, options.weight_decay
    dtype = jnp.bfloat16 if options.moment_dtype == "bfloat16" else None
    tail = [scale_by_multipliers(options.lr_multipliers)] + ([track(options.ema_sigmas)] if options.ema_sigmas else [])
    if options.optimizer == "muon":
        # Muon decays its kernels. Adam, which takes biases, norms and embedding tables, decays nothing here.
        update = optax.contrib.muon(
            rate, weight_decay=decay, mu_dtype=dtype, adam_b1=b1, adam_b2=b2, consistent_rms=MUON_RMS,
            muon_weight_dimension_numbers=_muon_dimensions,
        )  # fmt: skip
        return optax.chain(clip, update, *tail)
    adam = scale_by_adam_int8(b1, b2) if options.moment_dtype == "int8" else optax.scale_by_adam(b1, b2, mu_dtype=dtype)
    scale = {
        "adamw": adam,
        "adafactor": optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)),
        "lion": optax.scale_by_lion(b1, b2, mu_dtype=dtype),
    }[options.optimizer]
    add_decay = optax.add_decayed_weights(decay, decay_mask)
    return optax.chain(clip, scale, add_decay, optax.scale_by_learning_rate(rate), *tail)


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Updates times min(1, max_norm / their norm) (Pascanu et al. 2013, algorithm 1).

    optax's version divides by the norm, which XLA does not fuse into the update of the moments, so that a clipped copy
    of the gradients is held in memory. A product is fused.
    """

    def clip(updates: Params, _: Params | None) -> Params:
        factor = jnp.minimum(1.0, max_norm / optax.tree.norm(updates))
        return jax.tree.map(lambda u: u * factor.astype(u.dtype), updates)

    return optax.stateless(clip)


def _muon_dimensions(params: Params) -> Any:
    """Dimension numbers of the kernels that Muon updates: dense [in, out], and convolutions [H, W, in, out]."""

    def dimension_numbers(path: tuple, param: Array) -> Any:
        if param.ndim < 2 or _leaf_name(path) in ("embedding", "pos_embed"):
            return None
        return optax.contrib.MuonDimensionNumbers(tuple(range(param.ndim - 1)), param.ndim - 1)

    return jax.tree_util.tree_map_with_path(dimension_numbers, params)


def scale_by_multipliers(multipliers: tuple[tuple[str, float], ...]) -> optax.GradientTransformation:
    """Updates times the factor of their group: the longest prefix of an array's path, its keys joined by "/"; else 1.

    A prefix must end at a name's end, but may omit a block's number: "unet/down_blocks" matches all of them,
    "unet/down_blocks_1" not the tenth, and "text_encoder" not "text_encoder_2". The "lora/" of a LoRA's layers may be
    omitted: ("text_encoder", 0.1) applies to the text encoder or its LoRA.

    >>> tx = scale_by_multipliers((("unet", 0.5), ("unet/conv_in", 0.0)))
    >>> params = {"unet": {"conv_in": jnp.ones(1), "conv_out": jnp.ones(1)}, "vae": jnp.ones(1)}
    >>> updates, _ = tx.update(params, tx.init(params))
    >>> [float(x[0]) for x in jax.tree.leaves(updates)]
    [0.0, 0.5, 1.0]
    """
    if not multipliers:
        return optax.identity()

    def scaled(path: tuple, update: Array) -> Array:
        return update * _multiplier(multipliers, path_name(path))

    return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(scaled, updates))


def check_multipliers(multipliers: Sequence[tuple[str, float]], params: Params, trainable: Sequence[str]) -> None:
    """Refuse multipliers that match no parameter.

    Those of a frozen module and of a text encoder that the model lacks are allowed, so that configs can be shared.

    Args:
        params: all parameters, arrays or shapes.
        trainable: keys of `params` that are trained.

    Raises:
        OptionsError: one is not a pair, its prefix matches no parameter, or nothing would be trained.
    """
    check_pairs(multipliers)
    names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    trained = [name for name in names if name.split("/")[0] in trainable]
    modules = {re.split(r"[./]", name.removeprefix(LORA))[0] for name in trained}
    known = trained + [name for name in names if name.split("/")[0] not in modules]
    has_encoders = any(_has_prefix(name, encoder) for name in names for encoder in ENCODERS)
    for prefix, _ in multipliers:
        is_absent_encoder = has_encoders and prefix.removeprefix(LORA) in ENCODERS
        if not is_absent_encoder and not any(_has_prefix(name, prefix) for name in known):
            raise OptionsError(
                f"lr_multipliers: no trained parameter begins with {prefix!r}; one of them is {trained[0]!r}."
            )
    if multipliers and not any(_multiplier(multipliers, name) for name in trained):
        raise OptionsError(f"lr_multipliers {tuple(multipliers)!r} are 0 for every trained parameter: leave one out.")


def _multiplier(multipliers: Sequence[tuple[str, float]], name: str) -> float:
    longest = sorted(multipliers, key=lambda pair: -len(pair[0].removeprefix(LORA)))
    return next((factor for prefix, factor in longest if _has_prefix(name, prefix)), 1.0)


def _has_prefix(name: str, prefix: str) -> bool:
    prefix = prefix.rstrip("/.")
    if prefix == LORA.rstrip("/"):
        return name.startswith(LORA)
    name, prefix = name.removeprefix(LORA), prefix.removeprefix(LORA)
    boundary = r"[/.]|_\d|$" if re.search(r"[/.]", prefix) else r"[/.]|$"  # blocks are numbered, and so are modules
    return name.startswith(prefix) and re.match(boundary, name[len(prefix) :]) is not None


class AdamInt8(NamedTuple):
    """Moments quantized to 8 bits with one scale per row; each tree has the structure of the parameters."""

    updates: Array  # [] int32, the number of updates
    mu: Any  # int8: sign(m) sqrt(|m| / scale) 127
    mu_scale: Any  # float32 [..., 1]: the largest |m| of a row
    nu: Any  # uint8: (v / scale)^(1/4) 255, rounded up
    nu_scale: Any


def scale_by_adam_int8(b1: float, b2: float, eps: float = 1e-8) -> optax.GradientTransformation:
    """Adam with moments in 8 bits, quantised row by row (after Dettmers et al. 2022, section 2).

    Roots spread the levels over many magnitudes, like the paper's dynamic tree. The second moment is rounded up, so
    that no step is larger than Adam's. Arrays of fewer than MIN_QUANTIZED elements keep float32.
    """

    def quantize(x: Array, root: int, levels: int, rounding: Callable, dtype: Any) -> tuple[Array, Array]:
        if x.size < MIN_QUANTIZED:
            return x, jnp.ones((1,) * x.ndim)
        scale = jnp.max(jnp.abs(x), -1, keepdims=True)
        ratio = jnp.abs(x) / jnp.where(scale == 0, 1.0, scale)
        return (jnp.sign(x) * rounding(levels * ratio ** (1 / root))).astype(dtype), scale

    def dequantize(x: Array, scale: Array, root: int, levels: int) -> Array:
        x, unquantized = x.astype(jnp.float32), x.dtype == jnp.float32
        return x if unquantized else jnp.sign(x) * (jnp.abs(x) / levels) ** root * scale

    def pack(mu: Sequence[Array], nu: Sequence[Array], count: Array, treedef: Any) -> AdamInt8:
        mu_pairs = [quantize(m, 2, 127, jnp.round, jnp.int8) for m in mu]
        nu_pairs = [quantize(v, 4, 255, jnp.ceil, jnp.uint8) for v in nu]
        parts = [[pair[i] for pair in pairs] for pairs in (mu_pairs, nu_pairs) for i in (0, 1)]
        return AdamInt8(count, *(jax.tree.unflatten(treedef, part) for part in parts))

    def init(params: Params) -> AdamInt8:
        leaves, treedef = jax.tree.flatten(params)
        zeros = [jnp.zeros(p.shape) for p in leaves]
        return pack(zeros, zeros, jnp.zeros((), jnp.int32), treedef)

    def update(grads: Params, state: AdamInt8, params: Params | None = None) -> tuple[Params, AdamInt8]:
        leaves, treedef = jax.tree.flatten(grads)
        moments = [jax.tree.leaves(part) for part in state[1:]]
        mu = [b1 * dequantize(m, s, 2, 127) + (1 - b1) * g for g, m, s in zip(leaves, *moments[:2], strict=True)]
        nu = [b2 * dequantize(v, s, 4, 255) + (1 - b2) * g * g for g, v, s in zip(leaves, *moments[2:], strict=True)]
        count = state.updates + 1
        mu_correction, nu_correction = 1 - b1**count, 1 - b2**count
        updates = [(m / mu_correction) / (jnp.sqrt(v / nu_correction) + eps) for m, v in zip(mu, nu, strict=True)]
        return jax.tree.unflatten(treedef, updates), pack(mu, nu, count, treedef)

    return optax.GradientTransformation(init, update)
