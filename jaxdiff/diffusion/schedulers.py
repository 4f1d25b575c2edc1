"""Schedulers: each step leads from the noise level of one time to the lower one of the next.

They see a network only as denoise(x, time) -> x0, and a process only as x = alpha x0 + sigma eps, so each works for
variance-preserving, variance-exploding, zero-terminal-SNR and flow models alike. Primes mark the end of the step.

    eps = (x - alpha x0) / sigma                         the noise that a prediction of x0 implies              (1)
    r = (sigma' / alpha') / (sigma / alpha)              ratio of the noise levels sigma / alpha, in [0, 1]     (2)

All first-order steps are one formula, with fresh noise z and eta in [0, 1] (Song et al. 2021, DDIM, equations 12, 16):

    x' = alpha' x0 + sigma' sqrt(1 - eta^2 (1 - r^2)) eps + sigma' eta sqrt(1 - r^2) z                          (3)

eta = 0 is DDIM, and is Euler's method for dx~/dsigma~ = eps in x~ = x / alpha, sigma~ = sigma / alpha (Karras et al.
2022, equation 3 with sigma = t). eta = 1 is the ancestral sampling of DDPM (Ho et al. 2020, equation 7) and
k-diffusion's Euler ancestral. They differ in their time grids, in clipping and in the variance of the noise.

Heun's method (Karras et al. 2022, algorithm 1) averages the slopes at both ends of the step in x / s and sigma / s,

    x' = s' x / s + (sigma' - sigma s' / s) (d + d') / 2,   d = (x - s x0) / sigma                              (4)

where s = alpha, and d = eps; on a flow s = alpha + sigma = 1, and d = eps - x0.

singlestep.py holds the methods that use (3) and (4) alone, multistep.py those that use (3) with an average of the
predictions of several steps. This file lists them all by name.
"""

from collections.abc import Callable
from typing import Any

from jaxdiff.config import SchedulerConfig
from jaxdiff.diffusion.base import Clip, Scheduler, clip_to, dynamic_threshold, with_clipping
from jaxdiff.diffusion.multistep import dpmpp_2m, lms, pndm, unipc
from jaxdiff.diffusion.schedules import is_flow
from jaxdiff.diffusion.singlestep import (
    ddim,
    ddpm,
    dpmpp_2s_ancestral,
    dpmpp_sde,
    euler,
    euler_ancestral,
    heun,
    lcm,
    tcd,
)
from jaxdiff.diffusion.times import skip_prk_steps
from jaxdiff.errors import ArgumentError


def dpmpp_2m_sde(**options: Any) -> Scheduler:
    """`dpmpp_2m` with eta = 1 (sde-dpmsolver++ in diffusers, `sample_dpmpp_2m_sde` in k-diffusion)."""
    return dpmpp_2m(**{**options, "eta": 1.0})


SCHEDULERS: dict[str, Callable[..., Scheduler]] = {
    "ddim": ddim,
    "ddpm": ddpm,
    "pndm": pndm,
    "lms": lms,
    "euler": euler,
    "euler_ancestral": euler_ancestral,
    "heun": heun,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "dpmpp_sde": dpmpp_sde,
    "dpmpp_2s_ancestral": dpmpp_2s_ancestral,
    "unipc": unipc,
    "lcm": lcm,
    "tcd": tcd,
}
THRESHOLDED = ("ddim", "ddpm", "lcm", "dpmpp_2m", "dpmpp_2m_sde", "unipc")
CLIPPED = {"ddim": True, "ddpm": True, "heun": False, "lcm": False}  # whether x0 is clipped if the config does not say


def get_scheduler(name: str, config: SchedulerConfig | None = None) -> Scheduler:
    """The scheduler of this name, with the options that the corresponding diffusers class reads from a config.

    These are clipping and thresholding of x0 (`CLIPPED`, `THRESHOLDED`), the variance (ddpm), the solver's order, type
    and last steps (dpmpp_2m, unipc), the first steps (pndm) and the boundary condition (lcm). Without a config x0 is
    not clipped.

    Args:
        name: one of `SCHEDULERS`.
        config: such as `model.scheduler`.

    Raises:
        ValueError: an unknown name, or an option of the config that is not supported.
    """
    if name not in SCHEDULERS:
        raise ArgumentError("scheduler", f"{name!r} is unknown; known are {', '.join(SCHEDULERS)}.")
    if config is None:
        return SCHEDULERS[name]()
    options, clip = _options(name, config), _clip(name, config)
    if name == "ddim":
        return ddim(clip=clip)
    return with_clipping(SCHEDULERS[name](**options), clip)


def _clip(name: str, config: SchedulerConfig) -> Clip | None:
    if config.thresholding and name in THRESHOLDED:
        return dynamic_threshold(config.dynamic_thresholding_ratio, config.sample_max_value)
    clips = name in CLIPPED and (CLIPPED[name] if config.clip_sample is None else config.clip_sample)
    return clip_to(config.clip_sample_range) if clips else None


def _options(name: str, config: SchedulerConfig) -> dict[str, Any]:
    """The options of one scheduler in a config, other than clipping."""
    if name == "ddpm":
        return {"variance_type": config.variance_type or "fixed_small"}
    if name == "heun":
        return {"flow": is_flow(config)}
    if name == "pndm":
        return {"skip_prk_steps": skip_prk_steps(config), "prediction_type": config.prediction_type}
    if name == "lcm":
        return {"timestep_scaling": config.timestep_scaling}
    solver = {"order": config.solver_order, "lower_order_final": config.lower_order_final}
    if name == "unipc":
        prediction_type = "sample" if config.predict_x0 else "epsilon"
        # As in diffusers, a solver_type that only DPMSolverMultistepScheduler has means the default.
        solver_type = "bh1" if config.solver_type == "bh1" else "bh2"
        return {
            **solver,
            "solver_type": solver_type,
            "prediction_type": prediction_type,
            "disable_corrector": config.disable_corrector,
        }
    if name in ("dpmpp_2m", "dpmpp_2m_sde"):
        if (config.variance_type or "").startswith("learned"):
            raise ValueError(
                f'variance_type "{config.variance_type}" (scheduler_config.json) is refused: take "fixed_small".'
            )
        if config.algorithm_type == "sde-dpmsolver":
            raise ValueError('algorithm_type "sde-dpmsolver" is refused: take "sde-dpmsolver++".')
        prediction_type = "epsilon" if config.algorithm_type == "dpmsolver" and name == "dpmpp_2m" else "sample"
        if prediction_type == "epsilon" and config.final_sigmas_type == "zero":
            raise ValueError('algorithm_type "dpmsolver" needs final_sigmas_type "sigma_min" in scheduler_config.json.')
        solver_type = "heun" if config.solver_type == "heun" else "midpoint"
        return {
            **solver,
            "solver_type": solver_type,
            "prediction_type": prediction_type,
            "euler_at_final": config.euler_at_final,
        }
    return {}
