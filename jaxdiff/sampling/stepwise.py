"""Drawing that returns control to the caller every few steps, for progress, previews and cancelling.

The program of `generate` is split into three: what precedes the steps, some of the steps, and decoding. Between them
all data stays on the devices.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff import mapping, parallel
from jaxdiff.diffusion.base import Scheduler
from jaxdiff.diffusion.inpainting import masked_blending
from jaxdiff.diffusion.sampling_loop import advance
from jaxdiff.diffusion.schedulers import get_scheduler
from jaxdiff.models.conditioning import Conditioning
from jaxdiff.models.model import Model
from jaxdiff.sampling.checks import as_devices
from jaxdiff.sampling.generate import (
    Drawn,
    network,
    padded_inputs,
    sampler,
    to_compute_dtype,
)
from jaxdiff.sampling.inputs import (
    CallInputs,
    ImageInputs,
    codec,
    conditions,
    extra_channels,
    latent_mask,
    preview_codec,
    starting_point,
    text_by_step,
    to_uint8,
)
from jaxdiff.sampling.resolve import Request
from jaxdiff.typing import Array, Params

SECONDS = 0.5  # between two `Progress` reports
PROGRAMS = 64  # cached programs of each kind


class Progress(NamedTuple):
    """The progress of B images."""

    step: int  # steps taken
    steps: int  # in all; the images are finished when step == steps
    images: Callable[[], np.ndarray]  # uint8 [B, H, W, 3]: the latest step's predictions, or the finished images
    finite: np.ndarray | None = None  # bool [B], when finished: whether every pixel is finite


@dataclasses.dataclass
class Pace:
    """The time that a step takes; pass it to the next call that draws images like these."""

    seconds: float | None = None  # of a step; None: unknown


class LoopState(NamedTuple):
    """The state between two programs, on the devices."""

    inputs: ImageInputs
    cond: Conditioning
    uncond: Conditioning | None
    extra: Array | None  # see `extra_channels`
    original: Array | None  # latents of the image to inpaint, for models not trained for inpainting
    state: Any  # the scheduler's


class Programs(NamedTuple):
    """The compiled programs; each device's `LoopState` has an axis of length 1 before all others."""

    begin: mapping.Mapped  # (params, CallInputs, ImageInputs) -> LoopState
    advance: mapping.Mapped  # (params, CallInputs, [first step, last step + 1], LoopState) -> LoopState
    preview: mapping.Mapped  # (params, LoopState) -> Drawn
    finish: mapping.Mapped  # (params, LoopState) -> Drawn


@functools.lru_cache(maxsize=PROGRAMS)
def programs(
    model: Model,
    scheduler: str | Scheduler,
    clip_skip: int,
    tile: int | None,
    devices: tuple[jax.Device, ...] | jax.sharding.Mesh,
) -> Programs:
    """The compiled programs; like `sampler`, compiled again for other shapes, types, or fields that are None."""
    model, cast = to_compute_dtype(model, devices)
    method = scheduler if isinstance(scheduler, Scheduler) else get_scheduler(scheduler, model.scheduler)

    def begin(params: Params, call: CallInputs, inputs: ImageInputs) -> LoopState:
        params = cast(params)
        vae = codec(model, params, tile)
        cond, uncond = conditions(model, params, inputs, clip_skip)
        x, _ = starting_point(model, vae, call, inputs, call.start, None, method)
        original = None
        if inputs.image is not None and inputs.mask is not None and not model.inpaints:
            original = vae.encode(inputs.image)
        extra = extra_channels(model, vae, inputs)
        unused: dict[str, Any] = dict.fromkeys(("tokens", "negative", "image", "blend_tokens", "blend_negative"))
        return add_axis(LoopState(inputs._replace(**unused), cond, uncond, extra, original, method.init(x)))

    def advance_steps(params: Params, call: CallInputs, span: Array, loop_state: LoopState) -> LoopState:
        inputs, cond, uncond, extra, original, state = loop_state = remove_axis(loop_state)
        denoise_with, steps = network(model, cast(params), call, inputs, extra), method
        if original is not None and inputs.mask is not None:
            steps = masked_blending(steps, original, inputs.noise, latent_mask(model, inputs.mask))
        if inputs.picks is not None:
            steps = text_by_step(steps, inputs.picks[:, 0], call.start, (cond, uncond), denoise_with)
        denoise = denoise_with(cond, uncond)
        return add_axis(
            loop_state._replace(state=advance(denoise, state, call.times, steps, inputs.keys, span[0], span[1]))
        )

    def preview(params: Params, loop_state: LoopState) -> Drawn:
        params = cast(params)
        return decode_images(
            preview_codec(model, params, codec(model, params, tile)), remove_axis(loop_state).state.denoised
        )

    def finish(params: Params, loop_state: LoopState) -> Drawn:
        return decode_images(codec(model, cast(params), tile), remove_axis(loop_state).state.x)

    return Programs(
        mapping.pmap(begin, devices, shared=2),
        mapping.pmap(advance_steps, devices, shared=3),
        mapping.pmap(preview, devices, shared=1),
        mapping.pmap(finish, devices, shared=1),
    )


def add_axis(loop_state: LoopState) -> LoopState:
    """Add a leading axis to divide over the devices: not every array of a scheduler's state has a batch axis."""
    return jax.tree.map(lambda x: x[None], loop_state)


def remove_axis(loop_state: LoopState) -> LoopState:
    """The reverse of `add_axis`."""
    return jax.tree.map(lambda x: x[0], loop_state)


def draw_stepwise(
    model: Model,
    params: Params,
    request: Request,
    *,
    seconds: float = SECONDS,
    stops: Collection[int] = (),
    pace: Pace | None = None,
) -> Iterator[Progress]:
    """Draw the images of a request, and yield control between pieces; close the iterator to cancel.

    The images are those of `draw`, within one grey level. With `hires` they are drawn in one piece.

    Args:
        seconds: about how long one piece takes.
        stops: steps, counted from the first taken, at which a piece always ends.
        pace: of earlier images like these; it is updated. None: the first piece is one step, and the next ones grow.
    """
    pace = Pace() if pace is None else pace
    settings, count = request.settings, len(request.prompts)
    devices = as_devices(None, count, params)
    if settings.lowres_latents is not None:
        sampler_args = model, settings.scheduler, settings.clip_skip, settings.hires_upscale, settings.tile, devices
        yield final_progress(1, sampler(*sampler_args)(params, *padded_inputs(model, request)), count)
        return
    program = programs(model, settings.scheduler, settings.clip_skip, settings.tile, devices)
    call, inputs = padded_inputs(model, request)
    inputs = mapping.filled_rows(inputs, count, mapping.part_count(devices))
    first = 0 if call.start is None else int(call.start)
    steps = len(settings.call.times.t) - 1 - first
    loop_state = program.begin(params, call, inputs)
    step, piece_steps = 0, steps
    if pace.seconds is None:
        loop_state, piece_steps = jax.block_until_ready(loop_state), 1
    while step < steps:
        start_time = time.perf_counter()
        if pace.seconds is not None:
            piece_steps = max(1, min(round(seconds / pace.seconds), piece_steps))
        start, step = step, min(step + piece_steps, steps, *(stop for stop in stops if stop > step))
        loop_state = program.advance(params, call, np.asarray([first + start, first + step], np.int32), loop_state)
        progress = Progress(step, steps, functools.partial(preview_images, program, params, loop_state, count))
        if step < steps:
            jax.block_until_ready(loop_state)
        else:  # the last steps and the decoding are one piece
            progress = final_progress(steps, program.finish(params, loop_state), count)
        if step < steps or not start:
            pace.seconds = (time.perf_counter() - start_time) / (step - start)
        piece_steps *= 2
        yield progress


def preview_images(program: Programs, params: Params, loop_state: LoopState, count: int) -> np.ndarray:
    """The latest step's prediction of the first `count` images, uint8 [count, H, W, 3]."""
    return parallel.fetch(program.preview(params, loop_state)).images[:count]


def final_progress(steps: int, drawn: Drawn, count: int) -> Progress:
    """The last report: the first `count` of the images drawn."""
    output = parallel.fetch(drawn)
    return Progress(steps, steps, lambda: output.images[:count], output.finite[:count])


def decode_images(vae: Any, latents: Array) -> Drawn:
    """Images of latents [B, h, w, C]."""
    images = vae.decode(latents)
    return Drawn(to_uint8(images), jnp.isfinite(images).all((1, 2, 3)), None)
