"""Time grids: the times at which a scheduler calls the network, as in the scheduler's diffusers class.

As in k-diffusion and diffusers, the sigmas of this file are noise levels: the sigma_t / alpha_t of schedules.py.
Spacings by timestep give timesteps; their sigmas are interpolated in the table of the process. Spacings by noise level
give sigmas; their timesteps are found by interpolating log(sigma), and their ends are those of the grid by timestep
that the config names, or of the whole table. `RULES` lists the other differences between the classes.

A flow has grids of its own: sigma = t / T, evenly spaced from 1 and then shifted (schedules.py, equation 8). In its
sigma_t / alpha_t that is t / (T - t).
"""

from typing import NamedTuple

import numpy as np

from jaxdiff.config import SchedulerConfig
from jaxdiff.diffusion.schedules import Time, is_flow, noise_schedule, shift_time
from jaxdiff.diffusion.spacing import (
    SIGMA_SPACINGS,
    SPACINGS,
    TIMESTEP_SPACINGS,
    distilled_timesteps,
    spaced_sigmas,
    spaced_timesteps,
)
from jaxdiff.errors import ArgumentError

TCD_GAMMA = 0.3  # fraction of each TCD step that is fresh noise (Zheng et al. 2024)


class Rule(NamedTuple):
    """The time grid of one diffusers class."""

    spacing: str  # default if scheduler_config.json names none; "distilled" overrides it
    # Where the last step ends: "zero", "sigma_min" (the table's first), or the config key that decides.
    final_sigma: str
    fractional_timesteps: bool = False  # timesteps of linspace and of spacings by noise level are not rounded
    scale_initial_noise: bool = False  # starts from noise times sigma_0 rather than 1, except on leading grids
    sigma_spacings: bool = False  # reads `use_karras_sigmas`, `use_exponential_sigmas`, `use_beta_sigmas`
    finite_sigma_max: bool = False  # a zero-SNR table ends at alpha = 2**-12 rather than 0
    drop_last_point: bool = False  # makes N + 1 points and drops the last; noise levels span the whole table


_SIGMAS = {"fractional_timesteps": True, "scale_initial_noise": True}
_SOLVER = Rule("linspace", "final_sigmas_type", sigma_spacings=True, finite_sigma_max=True, drop_last_point=True)
RULES: dict[str, Rule] = {
    "ddim": Rule("leading", "set_alpha_to_one"),
    "ddpm": Rule("leading", "zero"),
    "pndm": Rule("leading", "set_alpha_to_one"),
    "lms": Rule("linspace", "zero", sigma_spacings=True, finite_sigma_max=True, **_SIGMAS),
    "euler": Rule("linspace", "final_sigmas_type", sigma_spacings=True, finite_sigma_max=True, **_SIGMAS),
    "euler_ancestral": Rule("linspace", "zero", finite_sigma_max=True, **_SIGMAS),
    "heun": Rule("linspace", "zero", sigma_spacings=True, **_SIGMAS),
    "dpmpp_2m": _SOLVER,
    "dpmpp_2m_sde": _SOLVER,
    "dpmpp_sde": Rule("linspace", "zero", sigma_spacings=True, finite_sigma_max=True, **_SIGMAS),
    "dpmpp_2s_ancestral": Rule("linspace", "zero", sigma_spacings=True, finite_sigma_max=True, **_SIGMAS),
    "unipc": _SOLVER,
    "lcm": Rule("distilled", "zero"),
    "tcd": Rule("distilled", "sigma_min"),
}

# Scheduler names by diffusers class; any other class is sampled with dpmpp_2m.
CLASSES = {
    "DDIMScheduler": "ddim",
    "DDIMParallelScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "DDPMParallelScheduler": "ddpm",
    "PNDMScheduler": "pndm",
    "LMSDiscreteScheduler": "lms",
    "EulerDiscreteScheduler": "euler",
    "FlowMatchEulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
    "HeunDiscreteScheduler": "heun",
    "FlowMatchHeunDiscreteScheduler": "heun",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "DPMSolverSDEScheduler": "dpmpp_sde",
    "UniPCMultistepScheduler": "unipc",
    "LCMScheduler": "lcm",
    "TCDScheduler": "tcd",
}


def default_scheduler(config: SchedulerConfig) -> str:
    """The scheduler of a config's diffusers class; "dpmpp_2m" for classes without a counterpart here.

    >>> default_scheduler(SchedulerConfig(class_name="EulerDiscreteScheduler"))
    'euler'
    """
    name = CLASSES.get(config.class_name, "dpmpp_2m")
    return "dpmpp_2m_sde" if name == "dpmpp_2m" and config.algorithm_type.startswith("sde") else name


def skip_prk_steps(config: SchedulerConfig) -> bool:
    """Whether PNDM starts without Runge-Kutta steps: as the config says, else all classes but PNDMScheduler do."""
    return config.class_name != "PNDMScheduler" if config.skip_prk_steps is None else config.skip_prk_steps


def network_calls(config: SchedulerConfig, steps: int, scheduler: str) -> int:
    """How many times the network is called in `steps` steps to a clean sample; by heun once less from pure noise.

    >>> [network_calls(SchedulerConfig(), 10, name) for name in ("ddim", "heun", "pndm")]
    [10, 19, 11]
    """
    if scheduler in ("heun", "dpmpp_sde", "dpmpp_2s_ancestral"):
        return 2 * steps - 1
    if scheduler == "pndm":
        return steps + (1 if skip_prk_steps(config) or steps < 4 else 9) * (steps > 1)
    return steps


def time_grid(
    config: SchedulerConfig,
    steps: int,
    scheduler: str = "ddim",
    spacing: str | None = None,
    *,
    strength: float = 1.0,
    mu: float | None = None,
) -> tuple[Time, np.float32]:
    """The time grid of a scheduler, and the standard deviation of the noise to start from.

    Args:
        config: of the process and of its grid, such as `model.scheduler`.
        steps: N, at least 1.
        scheduler: a name in `SCHEDULERS`; the grid is that of the corresponding diffusers class.
        spacing: one of `SPACINGS`; None: what the config says, else the default of the class. A spacing by noise level
            takes its ends from the grid by timestep that the config names.
        strength: in (0, 1], for the grids of distilled models only (see `is_distilled`): the N steps cover this
            fraction of the distillation's timesteps, those with the least noise, to redraw an image.
        mu: of a flow with a dynamic shift, see `shift_time`.

    Returns:
        Time with float32 numpy fields [N + 1], from noise to image, and the scale: sample from scale * unit noise.

    Raises:
        ValueError: an unknown scheduler or spacing, more steps than the spacing allows, or a config that is not
            supported.

    >>> times, scale = time_grid(SchedulerConfig(steps_offset=1), 4)
    >>> times.t.tolist(), float(times.sigma[-1]), float(scale)
    ([751.0, 501.0, 251.0, 1.0, 0.0], 0.0, 1.0)
    """
    if scheduler not in RULES:
        raise ArgumentError("scheduler", f"{scheduler!r} is unknown; known are {', '.join(RULES)}.")
    if steps < 1:
        raise ArgumentError("steps", f"{steps} must be at least 1.")
    rule, process = RULES[scheduler], Process(config, RULES[scheduler], scheduler)
    by_sigma = _sigma_spacing(config, rule, scheduler, spacing)
    by_timestep = _timestep_spacing(config, rule, spacing)
    if by_timestep not in (*TIMESTEP_SPACINGS, "distilled"):
        known = ", ".join(SPACINGS)
        raise ArgumentError("spacing", f"{by_timestep!r} is unknown; known are {known} (levels: use_…_sigmas).")
    process.check_config(by_sigma)
    if process.flow:
        t, sigmas = _flow_points(process, steps, by_timestep, by_sigma, mu)
    else:
        t, sigmas = _points(process, steps, by_timestep, by_sigma, strength)
    times = process.to_time(np.append(t, 0), np.append(sigmas, process.final_sigma()))
    if not (np.diff(sigmas) < 0).all():
        raise ArgumentError(
            "steps",
            f"{steps} is more than {by_sigma or by_timestep} spacing of {scheduler} allows: take fewer.",
        )
    if times.alpha[0] == 0 and config.prediction_type == "epsilon":
        advice = "the scheduler dpmpp_2m" if process.flow else 'spacing "leading"'
        raise ValueError(
            'a model of prediction_type "epsilon" cannot start from pure noise (alpha = 0), as this grid does: take '
            f"{advice}, or a model of another prediction type."
        )
    times = _with_substeps(process, times, t, sigmas, whole_timesteps=by_sigma is None and not process.flow)
    scaled = rule.scale_initial_noise and by_timestep != "leading"
    return times, np.float32(times.sigma[0]) if scaled else np.float32(1)


def _sigma_spacing(config: SchedulerConfig, rule: Rule, scheduler: str, spacing: str | None) -> str | None:
    """The spacing by noise level that is given, or that the config names, if the class reads it; None: by timestep."""
    if spacing:
        return spacing if spacing in SIGMA_SPACINGS else None
    if not (rule.sigma_spacings or is_flow(config)):
        return None
    if config.use_lu_lambdas and scheduler.startswith("dpmpp_2m"):
        return "exponential"
    if config.use_karras_sigmas:
        return "karras"
    return "exponential" if config.use_exponential_sigmas else "beta" if config.use_beta_sigmas else None


def _timestep_spacing(config: SchedulerConfig, rule: Rule, spacing: str | None) -> str:
    """The spacing by timestep; a spacing by noise level takes its ends from it."""
    if spacing and spacing not in SIGMA_SPACINGS:
        return spacing
    if is_flow(config):
        return config.timestep_spacing or "linspace"
    return rule.spacing if rule.spacing == "distilled" else config.timestep_spacing or rule.spacing


def is_distilled(config: SchedulerConfig, scheduler: str, spacing: str | None = None) -> bool:
    """Whether a scheduler's grid consists of the timesteps of a distillation.

    >>> is_distilled(SchedulerConfig(), "lcm"), is_distilled(SchedulerConfig(), "lcm", "trailing")
    (True, False)
    """
    return scheduler in RULES and _timestep_spacing(config, RULES[scheduler], spacing) == "distilled"


class Process:
    """Conversion between timesteps and noise levels, for one config and scheduler, in float64; inf at pure noise."""

    def __init__(self, config: SchedulerConfig, rule: Rule, scheduler: str) -> None:
        self.config, self.rule, self.scheduler, self.flow = config, rule, scheduler, is_flow(config)
        alpha, sigma = (a.astype(np.float64) for a in noise_schedule(config))
        if config.rescale_betas_zero_snr and rule.finite_sigma_max and not self.flow:
            alpha[-1] = 2.0**-12
        with np.errstate(divide="ignore"):
            self.sigmas = sigma / alpha  # at t = 0, 1, 2, …
        self.timesteps = np.arange(len(self.sigmas))

    def check_config(self, by_sigma: str | None) -> None:
        """Raise ValueError naming the first key of the config that would change the grid and is not supported."""
        config, flow = self.config, self.flow
        with np.errstate(divide="ignore"):
            clipped = -np.log(self.sigmas[-1]) < config.lambda_min_clipped
        unsupported = {
            "timestep_type": config.timestep_type != "discrete" and config.prediction_type == "v_prediction",
            "lambda_min_clipped": clipped and not by_sigma and not flow and self.scheduler.startswith("dpmpp_2m"),
            "final_sigmas_type": flow and self.rule.drop_last_point and config.final_sigmas_type != "zero",
            "invert_sigmas": flow and config.invert_sigmas,
            "shift_terminal": flow and config.shift_terminal,
            "interpolation_type": self.scheduler == "euler"
            and config.interpolation_type not in ("linear", "log_linear"),
            "stochastic_sampling": flow and self.scheduler == "euler" and config.stochastic_sampling,
        }
        for key, changes in unsupported.items():
            if changes:
                raise ValueError(
                    f"{key} {getattr(config, key)!r} (scheduler_config.json) is refused by {self.scheduler}: "
                    f"set it to {getattr(SchedulerConfig(), key)!r}, if the model was not made for it."
                )

    def t_to_sigma(self, t: np.ndarray) -> np.ndarray:
        """Noise levels of timesteps, by linear interpolation of the table; a flow's by its equation (7)."""
        if self.flow:
            with np.errstate(divide="ignore"):
                u = t / self.config.num_train_timesteps
                return u / (1 - u)
        return np.interp(t, self.timesteps, self.sigmas)

    def sigma_to_t(self, sigmas: np.ndarray) -> np.ndarray:
        """Timesteps of noise levels, by linear interpolation of the table's logarithm; a flow's by its equation (7)."""
        if self.flow:
            return self.config.num_train_timesteps * sigmas / (1 + sigmas)
        with np.errstate(divide="ignore"):
            return np.interp(np.log(np.maximum(sigmas, 1e-10)), np.log(self.sigmas), self.timesteps)

    def to_time(self, t: np.ndarray, sigmas: np.ndarray) -> Time:
        """Float32 times: noise levels s to alpha^2 = 1 / (1 + s^2), a flow's to alpha = 1 / (1 + s)."""
        with np.errstate(divide="ignore"):
            power = 1.0 if self.flow else 2.0
            alpha, sigma = (1 + sigmas**power) ** (-1 / power), (1 + sigmas**-power) ** (-1 / power)
        return Time(t.astype(np.float32), alpha.astype(np.float32), sigma.astype(np.float32))

    def final_sigma(self) -> float:
        """The noise level at which the last step ends: 0, or the lowest of the table."""
        rule, config = self.rule, self.config
        clean = rule.final_sigma != "sigma_min"
        if rule.final_sigma == "set_alpha_to_one":  # the classes' own defaults differ
            clean = self.scheduler == "ddim" if config.set_alpha_to_one is None else config.set_alpha_to_one
        if rule.final_sigma == "final_sigmas_type":
            if config.final_sigmas_type not in ("zero", "sigma_min"):
                raise ValueError(
                    f'final_sigmas_type {config.final_sigmas_type!r} is unknown; known are "zero" and "sigma_min".'
                )
            clean = config.final_sigmas_type == "zero" and config.interpolation_type != "log_linear"
        return 0.0 if clean else float(self.sigmas[0])


def _points(
    process: Process, steps: int, by_timestep: str, by_sigma: str | None, strength: float
) -> tuple[np.ndarray, np.ndarray]:
    """Timesteps and noise levels [N] of a process given by betas."""
    config, rule, table = process.config, process.rule, process.sigmas
    if by_timestep == "distilled":
        t = distilled_timesteps(config, steps, strength)
    else:
        t = spaced_timesteps(config, steps, by_timestep, rule.drop_last_point, rule.fractional_timesteps)
    if by_sigma is None:
        if process.scheduler == "euler" and config.interpolation_type == "log_linear":
            return t, spaced_sigmas("exponential", table[-1], table[0], steps + 1)[:-1]
        return t, process.t_to_sigma(t)
    if not np.isfinite(table[-1]):  # pure noise has no finite noise level to start from: take a high one
        table[-1] = 2.0**12
    lu_lambdas = by_sigma == "exponential" and config.use_lu_lambdas
    first, last = table[[-1, 0]] if rule.drop_last_point else process.t_to_sigma(t[[0, -1]])
    if not lu_lambdas:
        first, last = config.sigma_max or first, config.sigma_min or last
    sigmas = spaced_sigmas(by_sigma, first, last, steps)
    sigmas = np.clip(sigmas, min(table[0], last), max(table[-1], first))
    t = process.sigma_to_t(sigmas)
    if rule.drop_last_point:  # these classes keep the noise levels, and give the network whole timesteps
        cosine = config.beta_schedule == "squaredcos_cap_v2" and process.scheduler != "unipc"
        rounds = (by_sigma == "karras" or lu_lambdas) and not cosine
        # On the tables of Stable Diffusion, diffusers' arithmetic falls just short of the last entry.
        t = t.round() if rounds else np.floor(np.maximum(t - 1e-6, 0))
    return t, sigmas


def _flow_points(
    process: Process, steps: int, by_timestep: str, by_sigma: str | None, mu: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """Timesteps t = T sigma_t and noise levels [N] of a rectified flow.

    linspace is that of FlowMatchEulerDiscreteScheduler, except for dpmpp_2m and unipc: theirs is that of their own
    classes with flow sigmas.
    """
    config, total = process.config, float(process.config.num_train_timesteps)
    if config.use_dynamic_shifting and mu is None:
        raise ValueError(
            "use_dynamic_shifting (scheduler_config.json) is refused without a transformer: set it to false, and set "
            "shift."
        )
    if by_timestep == "leading":
        raise ArgumentError(
            "spacing", '"leading" does not start from pure noise, as a flow must: take linspace or trailing.'
        )
    if by_timestep == "trailing":
        t = total * (1 - np.arange(steps) / steps)
    elif process.scheduler == "unipc":
        t = total * np.linspace(1, 1 / total, steps + 1)[:-1]
    elif process.rule.drop_last_point:
        t = total * (1 - np.linspace(1, 1 / total, steps + 1))[:0:-1]
    else:
        # The class shifts the ends of its range in __init__, and then all points.
        t = np.linspace(total, shift_time(1.0, config), steps)
    t = shift_time(t, config, mu)
    if by_sigma is not None:
        if by_sigma not in ("karras", "exponential", "beta"):
            raise ArgumentError(
                "spacing", f'"{by_sigma}" is a table for Stable Diffusion, not for a flow: take linspace.'
            )
        t = total * spaced_sigmas(by_sigma, t[0] / total, t[-1] / total, steps)
    if process.scheduler == "unipc":
        t = np.minimum(t, total * (1 - 1e-6))
    return np.floor(t) if process.rule.drop_last_point else t, process.t_to_sigma(t)


def _with_substeps(process: Process, times: Time, t: np.ndarray, sigmas: np.ndarray, whole_timesteps: bool) -> Time:
    """The grid with `step_end` and `substeps`, for the schedulers that use them.

    Whether a grid has them, and their shapes, depend on the scheduler alone: changing the spacing never recompiles.

    Args:
        whole_timesteps: whether the entries of the grid are entries of the table.
    """
    name, total = process.scheduler, process.config.num_train_timesteps

    def at(t: np.ndarray) -> Time:
        return process.to_time(t, process.t_to_sigma(t))

    if name == "dpmpp_sde":
        high = np.minimum(sigmas, process.t_to_sigma(np.array(total - 1.0)))
        midpoints = np.sqrt(high * np.append(sigmas[1:], 0.0))
        return times._replace(substeps=process.to_time(process.sigma_to_t(midpoints)[:, None], midpoints[:, None]))
    if name == "tcd":
        end = (1 - TCD_GAMMA) * np.append(t[1:], 0.0)
        return times._replace(step_end=at(np.floor(end) if whole_timesteps else end))
    if name not in ("ddim", "pndm"):
        return times
    step_end, step = Time(times.t[1:], times.alpha[1:], times.sigma[1:]), total // len(t)
    if whole_timesteps:  # these classes step down by floor(T / N) whatever the spacing, and then take x to be at i + 1
        end = t - step
        end_sigmas = np.where(end < 0, process.final_sigma(), process.t_to_sigma(end))
        step_end = process.to_time(np.maximum(end, 0), end_sigmas)
    times = times._replace(step_end=step_end)
    return (
        times if name == "ddim" else times._replace(substeps=_pndm_substeps(process, times, t, step, whole_timesteps))
    )


def _pndm_substeps(process: Process, times: Time, t: np.ndarray, step: int, whole_timesteps: bool) -> Time:
    """The times within PNDM's first steps.

    For Runge-Kutta, [N, 2]: the time given to the network and the time of x at the half step. For Heun's step, [N, 1]:
    the time that diffusers takes as its start.
    """
    next_t = np.append(t[1:], t[-1:])
    if skip_prk_steps(process.config) and not whole_timesteps:
        return Time(times.t[:-1, None], times.alpha[:-1, None], times.sigma[:-1, None])
    if skip_prk_steps(process.config):
        substeps = (next_t + step)[:, None]
    elif whole_timesteps:
        substeps = np.stack([next_t + step // 2, t - step // 2], 1)
    else:
        substeps = np.stack([(t + next_t) / 2] * 2, 1)
    return process.to_time(substeps, process.t_to_sigma(substeps))
