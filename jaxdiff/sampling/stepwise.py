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
    computed_in,
    network,
    sampler,
    with_filled_grid,
)
from jaxdiff.sampling.inputs import (
    CallInputs,
    ImageInputs,
    as_bytes,
    by_step,
    codec,
    conditions,
    extra_channels,
    latent_mask,
    preview_codec,
    starting_point,
)
from jaxdiff.sampling.resolve import Request
from jaxdiff.typing import Array, Params

SECONDS = 0.5  # between two moments
PROGRAMS = 64  # kept of each kind


class Moment(NamedTuple):
    """The progress of B images."""

    step: int  # steps taken
    steps: int  # in all; the images are finished when step == steps
    images: Callable[[], np.ndarray]  # uint8 [B, H, W, 3]: what the latest step predicts, or the finished ones
    finite: np.ndarray | None = None  # bool [B], of finished ones: whether every pixel came out as a number


@dataclasses.dataclass
class Pace:
    """The time that a step takes; pass it to the next call that draws images like these."""

    seconds: float | None = None  # a step; None: not known yet


class Begun(NamedTuple):
    """The state between two programs, on the devices."""

    inputs: ImageInputs
    cond: Conditioning
    uncond: Conditioning | None
    extra: Array | None  # see `extra_channels`
    original: Array | None  # latents of the image to inpaint, for models not trained for inpainting
    state: Any  # the scheduler's


class Programs(NamedTuple):
    """The compiled programs; each device's `Begun` has an axis of length 1 before all others."""

    begin: mapping.Mapped  # (params, CallInputs, ImageInputs) -> Begun
    advance: mapping.Mapped  # (params, CallInputs, [first step, last step + 1], Begun) -> Begun
    preview: mapping.Mapped  # (params, Begun) -> Drawn
    finish: mapping.Mapped  # (params, Begun) -> Drawn


@functools.lru_cache(maxsize=PROGRAMS)
def programs(
    model: Model,
    scheduler: str | Scheduler,
    clip_skip: int,
    tile: int | None,
    devices: tuple[jax.Device, ...] | jax.sharding.Mesh,
) -> Programs:
    """The compiled programs; like `sampler`, compiled again for other shapes, types, or fields that are None."""
    model, widened = computed_in(model, devices)
    method = scheduler if isinstance(scheduler, Scheduler) else get_scheduler(scheduler, model.scheduler)

    def begin(params: Params, call: CallInputs, inputs: ImageInputs) -> Begun:
        params = widened(params)
        vae = codec(model, params, tile)
        cond, uncond = conditions(model, params, inputs, clip_skip)
        x, _ = starting_point(model, vae, call, inputs, call.start, None, method)
        original = None
        if inputs.image is not None and inputs.mask is not None and not model.inpaints:
            original = vae.encode(inputs.image)
        extra = extra_channels(model, vae, inputs)
        unread: dict[str, Any] = dict.fromkeys(("tokens", "negative", "image", "blend_tokens", "blend_negative"))
        return packed(Begun(inputs._replace(**unread), cond, uncond, extra, original, method.init(x)))

    def some_steps(params: Params, call: CallInputs, span: Array, begun: Begun) -> Begun:
        inputs, cond, uncond, extra, original, state = begun = unpacked(begun)
        denoise_with, steps = network(model, widened(params), call, inputs, extra), method
        if original is not None and inputs.mask is not None:
            steps = masked_blending(steps, original, inputs.noise, latent_mask(model, inputs.mask))
        if inputs.picks is not None:
            steps = by_step(steps, inputs.picks[:, 0], call.start, (cond, uncond), denoise_with)
        denoise = denoise_with(cond, uncond)
        return packed(begun._replace(state=advance(denoise, state, call.times, steps, inputs.keys, span[0], span[1])))

    def preview(params: Params, begun: Begun) -> Drawn:
        params = widened(params)
        return decoded(preview_codec(model, params, codec(model, params, tile)), unpacked(begun).state.denoised)

    def finish(params: Params, begun: Begun) -> Drawn:
        return decoded(codec(model, widened(params), tile), unpacked(begun).state.x)

    return Programs(
        mapping.pmap(begin, devices, shared=2),
        mapping.pmap(some_steps, devices, shared=3),
        mapping.pmap(preview, devices, shared=1),
        mapping.pmap(finish, devices, shared=1),
    )


def packed(begun: Begun) -> Begun:
    """Add a leading axis to divide over the devices: not every array of a scheduler's state has a batch axis."""
    return jax.tree.map(lambda x: x[None], begun)


def unpacked(begun: Begun) -> Begun:
    """The reverse of `packed`."""
    return jax.tree.map(lambda x: x[0], begun)


def draw_stepwise(
    model: Model,
    params: Params,
    request: Request,
    *,
    seconds: float = SECONDS,
    stops: Collection[int] = (),
    pace: Pace | None = None,
) -> Iterator[Moment]:
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
        static = model, settings.scheduler, settings.clip_skip, settings.hires_upscale, settings.tile, devices
        yield finished(1, sampler(*static)(params, *with_filled_grid(model, request)), count)
        return
    program = programs(model, settings.scheduler, settings.clip_skip, settings.tile, devices)
    call, inputs = with_filled_grid(model, request)
    inputs = mapping.filled_rows(inputs, count, mapping.part_count(devices))
    first = 0 if call.start is None else int(call.start)
    steps = len(settings.call.times.t) - 1 - first
    begun = program.begin(params, call, inputs)
    step, size = 0, steps
    if pace.seconds is None:
        begun, size = jax.block_until_ready(begun), 1
    while step < steps:
        began = time.perf_counter()
        if pace.seconds is not None:
            size = max(1, min(round(seconds / pace.seconds), size))
        start, step = step, min(step + size, steps, *(stop for stop in stops if stop > step))
        begun = program.advance(params, call, np.asarray([first + start, first + step], np.int32), begun)
        moment = Moment(step, steps, functools.partial(shown, program, params, begun, count))
        if step < steps:
            jax.block_until_ready(begun)
        else:  # the last steps and what follows them without a pause
            moment = finished(steps, program.finish(params, begun), count)
        if step < steps or not start:
            pace.seconds = (time.perf_counter() - began) / (step - start)
        size *= 2
        yield moment


def shown(program: Programs, params: Params, begun: Begun, count: int) -> np.ndarray:
    """The latest step's prediction of the first `count` images, uint8 [count, H, W, 3]."""
    return parallel.fetch(program.preview(params, begun)).images[:count]


def finished(steps: int, drawn: Drawn, count: int) -> Moment:
    """The last moment: the first `count` of the images drawn."""
    found = parallel.fetch(drawn)
    return Moment(steps, steps, lambda: found.images[:count], found.finite[:count])


def decoded(vae: Any, latents: Array) -> Drawn:
    """Images of latents [B, h, w, C]."""
    images = vae.decode(latents)
    return Drawn(as_bytes(images), jnp.isfinite(images).all((1, 2, 3)), None)
