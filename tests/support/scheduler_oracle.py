"""The PyTorch side of the comparison of schedulers: diffusers' classes run on the cases.

Imported only by tests that have asked for diffusers with `pytest.importorskip`, and by `make_golden_schedulers.py`.
"""

import importlib
import inspect
import sys
import types
from collections.abc import Callable
from unittest import mock

import diffusers
import numpy as np
import torch

from jaxdiff.config import SchedulerConfig
from tests.support.scheduler_cases import CLASSES, MASK, Case, mixing, network, noise, original, start

SIGMAS = ("EulerDiscrete", "EulerAncestral", "HeunDiscrete", "LMSDiscrete", "DPMSolverSDE")  # of sigma / alpha


def diffusers_class(name: str) -> type:
    if name == "DPMSolverSDEScheduler":  # refused without torchsde, whose noise is replaced here
        with mock.patch.dict(sys.modules, {"torchsde": types.ModuleType("torchsde")}):
            return importlib.import_module("diffusers.schedulers.scheduling_dpmsolver_sde").DPMSolverSDEScheduler
    return getattr(diffusers, name)


def build(config: SchedulerConfig, name: str):
    """The diffusers scheduler of a config; keys that the config leaves open take the defaults of the class."""
    cls, values = CLASSES[name], config.to_dict()
    if config.beta_schedule == "flow":
        if name in ("euler", "heun"):
            cls = f"FlowMatch{cls}"
        else:
            values |= {"use_flow_sigmas": True, "flow_shift": config.shift, "prediction_type": "flow_prediction"}
    made = diffusers_class(cls)
    known = inspect.signature(made.__init__).parameters
    values = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items() if k in known}
    return made(**values)


def entries(name: str, calls: int) -> list[int]:
    """Which calls of the network are those at the grid's entries, and none between."""
    if name in ("heun", "dpmpp_sde"):
        return [0, *range(1 if name == "heun" else 2, calls, 2)]
    return list(range(calls))


def grid(config: SchedulerConfig, name: str, steps: int):
    """(t [N], sigma [N + 1] or None, scale of the first noise) of the class."""
    scheduler = build(config, name)
    scheduler.set_timesteps(steps)
    t = scheduler.timesteps.numpy().astype(np.float64)
    sigma = scheduler.sigmas.numpy() if hasattr(scheduler, "sigmas") else None
    if scheduler.order == 2:  # the second call of each step is interleaved
        t, sigma = t[entries(name, len(t))], np.concatenate([sigma[:1], sigma[1:-1:2], sigma[-1:]])
    if name == "pndm":
        t = np.unique(t)[::-1] if config.skip_prk_steps else scheduler._timesteps[::-1].astype(np.float64)
    if config.interpolation_type == "log_linear":
        sigma = sigma[:-1]
    scale = getattr(scheduler, "init_noise_sigma", 1.0)
    return t, sigma, float(scale)


def alphas(scheduler, steps: int) -> np.ndarray:
    """The factors [N + 1] that turn the class's x at each time into alpha x0 + sigma eps."""
    if type(scheduler).__name__.startswith(SIGMAS):
        sigma = scheduler.sigmas.numpy().astype(np.float64)
        if scheduler.order == 2:
            sigma = np.concatenate([sigma[:1], sigma[1:-1:2], sigma[-1:]])
        return 1 / np.sqrt(sigma[: steps + 1] ** 2 + 1)  # log_linear has a level too many
    return np.ones(steps + 1)


def ends(scheduler, calls: int, steps: int) -> list[int]:
    """The calls of the network after which a step is done."""
    if scheduler.order == 2:
        return [*range(1, calls, 2), calls - 1]
    if calls == steps + 9:  # PNDM's first three steps have four calls
        return [3, 7, *range(11, calls)]
    return list(range(calls - steps, calls))


def brownian(skipped: int) -> Callable:
    """The noise of DPMSolverSDEScheduler: of half a step, then of the whole, from one path."""
    halves: list = []

    def sampler(*args):
        def draw(start, end):
            step, second = divmod(len(halves), 2)
            first, other = noise(skipped + step, 2)
            halves.append((start, end))
            if not second:
                return torch.from_numpy(first)
            middle = halves[-2][1]
            part = float((start - middle) / (start - end))
            return torch.from_numpy(np.float32(part**0.5 * first + (1 - part) ** 0.5 * other))

        return draw

    return sampler


def beginning(scheduler, case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """The times that are left, and x at the first of them, as the pipeline that redraws images has them."""
    x, taken = torch.from_numpy(start()), case.steps - case.start
    pipeline = types.SimpleNamespace(scheduler=scheduler)
    redraw = diffusers.StableDiffusionImg2ImgPipeline
    times, left = redraw.get_timesteps(pipeline, case.steps, (taken + 0.5) / case.steps, "cpu")
    assert left == taken
    if not case.start:
        return times, x * getattr(scheduler, "init_noise_sigma", 1.0)
    clean, first = torch.from_numpy(original()), times[:1].repeat(len(x))
    if hasattr(scheduler, "scale_noise"):  # of flows
        return times, scheduler.scale_noise(clean, first, x)
    return times, scheduler.add_noise(clean, x, first)


def with_the_right_sign(scheduler) -> None:
    """Mend the third term of sde-dpmsolver++ of order 3, which has -1/2 where the solution has +1/2.

    Its factor is alpha' ((1 - e^(-2h) - 2h) / (2h)^2 + 1/2), that is 2h alpha' phi_3(-2h), as -2h stands for -h in
    the term of dpmsolver++.
    """
    theirs = scheduler.multistep_dpm_solver_third_order_update

    def update(outputs, *args, sample, noise):
        sigmas = scheduler.sigmas[scheduler.step_index - 2 : scheduler.step_index + 2]
        alpha, sigma = scheduler._sigma_to_alpha_sigma_t(sigmas)
        h_1, h_0, h = torch.diff(torch.log(alpha) - torch.log(sigma))
        slopes = (outputs[-1] - outputs[-2]) * h / h_0, (outputs[-2] - outputs[-3]) * h / h_1
        return theirs(outputs, *args, sample=sample, noise=noise) + alpha[-1] * (slopes[0] - slopes[1]) * h / (
            h_0 + h_1
        )

    scheduler.multistep_dpm_solver_third_order_update = update


def run(case: Case) -> np.ndarray:
    """x after each step that is taken, [N, B, ...] float32, in the scale alpha x0 + sigma eps."""
    scheduler = build(case.values, case.scheduler)
    scheduler.set_timesteps(case.steps)
    if case.scheduler == "dpmpp_2m_sde":
        with_the_right_sign(scheduler)
    # The pipeline says which time is the first: else a whole time that comes twice at the start skips a step.
    timesteps, x = beginning(scheduler, case)
    drawn = (torch.from_numpy(noise(i)) for i in range(case.start, case.steps))
    states, module = [], type(scheduler).__module__
    with (
        mock.patch(f"{module}.randn_tensor", create=True, side_effect=drawn),
        mock.patch(f"{module}.BrownianTreeNoiseSampler", brownian(case.start), create=True),
    ):
        for t, following in zip(timesteps, [*timesteps[1:], None], strict=True):
            scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            options = {"eta": case.eta} if case.eta else {}
            output = (mixing if case.masked else network)(scaled, t, torch)
            x = scheduler.step(output, t, x, **options).prev_sample
            if case.masked:  # as StableDiffusionInpaintPipeline does
                kept = torch.from_numpy(original())
                if following is not None:
                    kept = scheduler.add_noise(kept, torch.from_numpy(start()), following[None])
                x = torch.where(torch.from_numpy(MASK), x, kept)
            states.append(x.numpy())
    scale = alphas(scheduler, case.steps)[case.start + 1 :].reshape(-1, *[1] * x.ndim)
    done = ends(scheduler, len(states), case.steps - case.start)
    return (np.stack([states[i] for i in done]) * scale).astype(np.float32)
