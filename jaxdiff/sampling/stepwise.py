"""Drawing that hands back control every few steps, for progress, previews and cancelling.

The one program of `generate` is divided into three here: what comes before the steps, some of the steps, and decoding.
Between them everything stays on the devices.
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

SECONDS = 0.5  # between two moments at which there is control
PROGRAMS = 64  # kept of each kind


class Moment(NamedTuple):
    """How far B images are."""

    step: int  # steps taken
    steps: int  # in all; the images are finished when all are taken
    images: Callable[[], np.ndarray]  # uint8 [B, H, W, 3]: what the latest step predicts, or the finished ones
    finite: np.ndarray | None = None  # bool [B], of finished ones: whether every pixel came out as a number


@dataclasses.dataclass
class Pace:
    """How long a step takes, as far as known: whoever draws the like again passes it on."""

    seconds: float | None = None


class Begun(NamedTuple):
    """What the steps need, on the devices."""

    inputs: ImageInputs
    cond: Conditioning
    uncond: Conditioning | None
    extra: Array | None  # see `extra_channels`
    original: Array | None  # latents of which a mask keeps a part, for models that were not taught to
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
    """With an axis along which the devices' parts lie: a scheduler's state is not all rows of a batch."""
    return jax.tree.map(lambda x: x[None], begun)


def unpacked(begun: Begun) -> Begun:
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
    """Draw the images of a request; between two moments the caller has control, and may close the iterator to cancel.

    The images are those of `draw`, within one grey level. With `hires` they are drawn in one piece.

    Args:
        seconds: about how long one piece takes.
        stops: steps, counted from the first taken, at which there is a moment in any case.
        pace: of earlier images like these, which is kept up to date; without, pieces begin with one step and grow.
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
    """What the latest step predicts of the first `count` images."""
    return parallel.fetch(program.preview(params, begun)).images[:count]


def finished(steps: int, drawn: Drawn, count: int) -> Moment:
    """The last moment, of the first `count` of the images drawn."""
    found = parallel.fetch(drawn)
    return Moment(steps, steps, lambda: found.images[:count], found.finite[:count])


def decoded(vae: Any, latents: Array) -> Drawn:
    """Images of latents [B, h, w, C]."""
    images = vae.decode(latents)
    return Drawn(as_bytes(images), jnp.isfinite(images).all((1, 2, 3)), None)
