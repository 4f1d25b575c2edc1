"""Time grids: the moments at which a scheduler calls the network, as diffusers' class of that scheduler lays them.

Times are spread as spacing.py says. Those of spacings by noise level are found in the table of the process, by
interpolating log(sigma / alpha); their ends are those of the class's other grid, or of the whole table. What else
differs from class to class is in `RULES`.

A flow has grids of its own, evenly spread over sigma = t / T from 1 and then shifted (schedules.py, equation 8).
"""

from typing import NamedTuple

import numpy as np

from jaxdiff.diffusion.schedules import Time, is_flow, noise_schedule, shift_time
from jaxdiff.diffusion.spacing import LEVELS, SPACINGS, STEPS, distilled, spaced, spread
from jaxdiff.errors import ArgumentError
from jaxdiff.scheduler_config import SchedulerConfig

GAMMA = 0.3  # of TCD: how much of each step's noise is new, Zheng et al. 2024


class Rule(NamedTuple):
    """How one class of diffusers lays out its grid."""

    spacing: str  # where scheduler_config.json names none; "distilled" whatever it names
    final: str  # where the last step ends: the config key that says so, "zero" for a clean sample, "first" of the table
    fractional: bool = False  # linspace times and those of levels keep their fraction
    scaled: bool = False  # starts from noise times sigma_0 rather than 1, but for leading grids
    levels: bool = False  # knows `use_karras_sigmas`, `use_exponential_sigmas`, `use_beta_sigmas`
    finite: bool = False  # a zero-SNR table ends at alpha^2 = 2**-24 rather than 0
    spare: int = 0  # points laid out beyond N and dropped from the end; 1 also takes levels from the whole table


_SIGMAS = {"fractional": True, "scaled": True}
_SOLVER = Rule("linspace", "final_sigmas_type", levels=True, finite=True, spare=1)
RULES: dict[str, Rule] = {
    "ddim": Rule("leading", "set_alpha_to_one"),
    "ddpm": Rule("leading", "zero"),
    "pndm": Rule("leading", "set_alpha_to_one"),
    "lms": Rule("linspace", "zero", levels=True, finite=True, **_SIGMAS),
    "euler": Rule("linspace", "final_sigmas_type", levels=True, finite=True, **_SIGMAS),
    "euler_ancestral": Rule("linspace", "zero", finite=True, **_SIGMAS),
    "heun": Rule("linspace", "zero", levels=True, **_SIGMAS),
    "dpmpp_2m": _SOLVER,
    "dpmpp_2m_sde": _SOLVER,
    "dpmpp_sde": Rule("linspace", "zero", levels=True, finite=True, **_SIGMAS),
    "dpmpp_2s_ancestral": Rule("linspace", "zero", levels=True, finite=True, **_SIGMAS),
    "unipc": _SOLVER,
    "lcm": Rule("distilled", "zero"),
    "tcd": Rule("distilled", "first"),
}

# Scheduler names by diffusers class; any other class is drawn with dpmpp_2m.
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
    """The scheduler that a config's own class names; "dpmpp_2m" for classes that have no counterpart here.

    >>> default_scheduler(SchedulerConfig(class_name="EulerDiscreteScheduler"))
    'euler'
    """
    name = CLASSES.get(config.class_name, "dpmpp_2m")
    return "dpmpp_2m_sde" if name == "dpmpp_2m" and config.algorithm_type.startswith("sde") else name


def skips_prk(config: SchedulerConfig) -> bool:
    """Whether PNDM starts without the steps of Runge and Kutta: as the file says, else only its own class has them."""
    return config.class_name != "PNDMScheduler" if config.skip_prk_steps is None else config.skip_prk_steps


def calls(config: SchedulerConfig, steps: int, scheduler: str) -> int:
    """How many times the network is called in so many steps to a clean sample.

    >>> [calls(SchedulerConfig(), 10, name) for name in ("ddim", "heun", "pndm")]
    [10, 19, 11]
    """
    if scheduler in ("heun", "dpmpp_sde", "dpmpp_2s_ancestral"):
        return 2 * steps - 1
    if scheduler == "pndm":
        return steps + (1 if skips_prk(config) or steps < 4 else 9) * (steps > 1)
    return steps


def time_grid(
    config: SchedulerConfig,
    steps: int,
    scheduler: str = "ddim",
    spacing: str | None = None,
    *,
    strength: float = 1.0,
) -> tuple[Time, np.float32]:
    """The grid of a scheduler, and the scale of the unit noise it starts from.

    Args:
        config: of the model's process and of the grid.
        steps: N.
        scheduler: a name of `SCHEDULERS`, whose diffusers class is followed.
        spacing: one of `SPACINGS`, those by noise level over the grid that the config names; None takes what the
            config says, else the default of the class.
        strength: in (0, 1], for a grid over the steps of a distillation (see `is_distilled`): how many of those are
            left, all N going through a picture that has the noise of the first.

    Returns:
        Time with float32 numpy fields [N + 1], from noise to picture, and the scale: sample from scale * noise.

    Raises:
        ValueError: an unknown scheduler or spacing, or more steps than the process has; the message says which.

    >>> times, scale = time_grid(SchedulerConfig(steps_offset=1), 4)
    >>> times.t.tolist(), float(times.sigma[-1]), float(scale)
    ([751.0, 501.0, 251.0, 1.0, 0.0], 0.0, 1.0)
    """
    if scheduler not in RULES:
        raise ArgumentError("scheduler", f"{scheduler!r} is unknown; known are {', '.join(RULES)}.")
    if steps < 1:
        raise ArgumentError("steps", f"{steps} must be at least 1.")
    rule, process = RULES[scheduler], Process(config, RULES[scheduler], scheduler)
    levels = spacing if spacing in LEVELS else None if spacing else _levels(config, rule, scheduler)
    base = _base(config, rule, spacing)
    if base not in (*STEPS, "distilled"):
        raise ArgumentError("spacing", f"{base!r} is unknown; known are {', '.join(SPACINGS)} (levels: use_…_sigmas).")
    process.check(by_time=levels is None)
    if process.flow:
        t, level = _flow_points(process, steps, base, levels)
    else:
        t, level = _points(process, steps, base, levels, strength)
    final = process.final()
    times = process.time(np.append(t, 0), np.append(level, final))
    if not (np.diff(level) < 0).all():
        raise ArgumentError(
            "steps", f"{steps} are more than {levels or base} spacing of {scheduler} has room for: take fewer."
        )
    if times.alpha[0] == 0 and config.prediction_type == "epsilon":
        raise ValueError(
            'a model of prediction_type "epsilon" cannot start from pure noise (alpha = 0), as this grid does: take '
            'spacing "leading", or a model of another prediction type.'
        )
    times = _with_stops(process, times, t, level, steps, by_time=levels is None)
    scale = np.float32(times.sigma[0]) if rule.scaled and base != "leading" else np.float32(1)
    return times, scale


def _levels(config: SchedulerConfig, rule: Rule, scheduler: str) -> str | None:
    """The spacing by noise level that a config names, if the class knows of any."""
    if not (rule.levels or is_flow(config)):
        return None
    if config.use_lu_lambdas and scheduler.startswith("dpmpp_2m"):
        return "exponential"
    if config.use_karras_sigmas:
        return "karras"
    return "exponential" if config.use_exponential_sigmas else "beta" if config.use_beta_sigmas else None


def is_distilled(config: SchedulerConfig, scheduler: str, spacing: str | None = None) -> bool:
    """Whether the grid of a scheduler lies over the steps of a distillation.

    >>> is_distilled(SchedulerConfig(), "lcm"), is_distilled(SchedulerConfig(), "lcm", "trailing")
    (True, False)
    """
    return scheduler in RULES and _base(config, RULES[scheduler], spacing) == "distilled"


def _base(config: SchedulerConfig, rule: Rule, spacing: str | None) -> str:
    if spacing and spacing not in LEVELS:
        return spacing
    if is_flow(config):
        return config.timestep_spacing or "linspace"
    return rule.spacing if rule.spacing == "distilled" else config.timestep_spacing or rule.spacing


class Process:
    """Noise levels at the times of one process, and back: sigma / alpha in float64, which may be infinite."""

    def __init__(self, config: SchedulerConfig, rule: Rule, scheduler: str) -> None:
        self.config, self.rule, self.scheduler, self.flow = config, rule, scheduler, is_flow(config)
        alpha, sigma = (a.astype(np.float64) for a in noise_schedule(config))
        if config.rescale_betas_zero_snr and rule.finite and not self.flow:
            alpha[-1] = 2.0**-12
        with np.errstate(divide="ignore"):
            self.table = sigma / alpha
        self.index = np.arange(len(self.table))

    def check(self, by_time: bool) -> None:
        """Raise ValueError naming the first key of the config that would change the grid in a way not known here."""
        config, flow = self.config, self.flow
        with np.errstate(divide="ignore"):
            clipped = -np.log(self.table[-1]) < config.lambda_min_clipped
        changing = {
            "timestep_type": config.timestep_type != "discrete" and config.prediction_type == "v_prediction",
            "lambda_min_clipped": clipped and by_time and not flow and self.scheduler.startswith("dpmpp_2m"),
            "final_sigmas_type": flow and self.rule.spare and config.final_sigmas_type != "zero",
            "invert_sigmas": flow and config.invert_sigmas,
            "shift_terminal": flow and config.shift_terminal,
            "interpolation_type": self.scheduler == "euler"
            and config.interpolation_type not in ("linear", "log_linear"),
            "stochastic_sampling": flow and self.scheduler == "euler" and config.stochastic_sampling,
        }
        for key, changes in changing.items():
            if changes:
                raise ValueError(
                    f"{key} {getattr(config, key)!r} (scheduler_config.json) is refused by {self.scheduler}: "
                    f"set it to {getattr(SchedulerConfig(), key)!r}, if the model was not made for it."
                )

    def level(self, t: np.ndarray) -> np.ndarray:
        """By interpolating the table linearly, a flow's sigma."""
        if self.flow:
            with np.errstate(divide="ignore"):
                u = t / self.config.num_train_timesteps
                return u / (1 - u)
        return np.interp(t, self.index, self.table)

    def t(self, level: np.ndarray) -> np.ndarray:
        """By interpolating the logarithm of the table, a flow's sigma."""
        if self.flow:
            return self.config.num_train_timesteps * level / (1 + level)
        with np.errstate(divide="ignore"):
            return np.interp(np.log(np.maximum(level, 1e-10)), np.log(self.table), self.index)

    def time(self, t: np.ndarray, level: np.ndarray) -> Time:
        """Times in float32."""
        with np.errstate(divide="ignore"):
            power = 1.0 if self.flow else 2.0
            alpha, sigma = (1 + level**power) ** (-1 / power), (1 + level**-power) ** (-1 / power)
        return Time(t.astype(np.float32), alpha.astype(np.float32), sigma.astype(np.float32))

    def final(self) -> float:
        """The level at which the last step ends: 0, or that of the first entry of the table."""
        rule, config = self.rule, self.config
        clean = rule.final != "first"
        if rule.final == "set_alpha_to_one":  # the classes' own defaults differ
            clean = self.scheduler == "ddim" if config.set_alpha_to_one is None else config.set_alpha_to_one
        if rule.final == "final_sigmas_type":
            if config.final_sigmas_type not in ("zero", "sigma_min"):
                raise ValueError(
                    f'final_sigmas_type {config.final_sigmas_type!r} is unknown; known are "zero" and "sigma_min".'
                )
            clean = config.final_sigmas_type == "zero" and config.interpolation_type != "log_linear"
        return 0.0 if clean else float(self.table[0])


def _points(
    process: Process, steps: int, base: str, levels: str | None, strength: float
) -> tuple[np.ndarray, np.ndarray]:
    """Times and levels [N] of a process given by betas."""
    config, rule, table = process.config, process.rule, process.table
    if base == "distilled":
        t = distilled(config, steps, strength)
    else:
        t = spaced(config, steps, base, rule.spare, rule.fractional)
    level = process.level(t)
    if levels is None:
        if process.scheduler == "euler" and config.interpolation_type == "log_linear":
            level = spread("exponential", table[-1], table[0], steps + 1)[:-1]
        return t, level
    if not np.isfinite(table[-1]):  # no level to start from: nearly pure noise will do
        table[-1] = 2.0**12
    first, last = table[[-1, 0]] if rule.spare else process.level(t[[0, -1]])
    if not (levels == "exponential" and config.use_lu_lambdas):
        first, last = config.sigma_max or first, config.sigma_min or last
    level = spread(levels, first, last, steps)
    level = np.clip(level, min(table[0], last), max(table[-1], first))
    t = process.t(level)
    if rule.spare:  # keep the levels, and tell the network whole times
        cosine = config.beta_schedule == "squaredcos_cap_v2" and process.scheduler != "unipc"
        whole = levels == "karras" or (levels == "exponential" and config.use_lu_lambdas)
        # On the tables of Stable Diffusion, diffusers' arithmetic falls just short of the last entry.
        t = t.round() if whole and not cosine else np.floor(np.maximum(t - 1e-6, 0))
    return t, level


def _flow_points(process: Process, steps: int, base: str, levels: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Times t = T sigma and levels [N] of a rectified flow.

    linspace is that of FlowMatchEulerDiscreteScheduler; dpmpp_2m's and unipc's, of their classes with flow sigmas.
    """
    config, total = process.config, float(process.config.num_train_timesteps)
    if config.use_dynamic_shifting:
        raise ValueError("use_dynamic_shifting (scheduler_config.json) is refused: set it to false, and shift.")
    if base == "leading":
        raise ArgumentError(
            "spacing", '"leading" does not start from pure noise, as a flow must: take linspace or trailing.'
        )
    if base == "trailing":
        t = total * (1 - np.arange(steps) / steps)
    elif process.scheduler == "unipc":
        t = total * np.linspace(1, 1 / total, steps + 1)[:-1]
    elif process.rule.spare:
        t = total * (1 - np.linspace(1, 1 / total, steps + 1))[:0:-1]
    else:
        # The class shifts its range at construction and the points of it again.
        t = np.linspace(total, shift_time(1.0, config), steps)
    t = shift_time(t, config)
    if levels is not None:
        if levels not in ("karras", "exponential", "beta"):
            raise ArgumentError(
                "spacing", f'"{levels}" is a table for Stable Diffusion, not for a flow: take linspace.'
            )
        t = total * spread(levels, t[0] / total, t[-1] / total, steps)
    if process.scheduler == "unipc":
        t = np.minimum(t, total * (1 - 1e-6))
    return np.floor(t) if process.rule.spare else t, process.level(t)


def _with_stops(process: Process, times: Time, t: np.ndarray, level: np.ndarray, steps: int, by_time: bool) -> Time:
    """The grid with the times that some schedulers visit besides its entries.

    Given whatever the spacing, so that compiled programs do not depend on it.
    """
    name, step = process.scheduler, process.config.num_train_timesteps // steps
    table_times = by_time and not process.flow  # the entries are entries of the table

    def at(t: np.ndarray) -> Time:
        return process.time(t, process.level(t))

    if name == "dpmpp_sde":
        high = np.minimum(level, process.level(np.array(process.config.num_train_timesteps - 1.0)))
        middle = np.sqrt(high * np.append(level[1:], 0.0))
        return times._replace(middle=process.time(process.t(middle)[:, None], middle[:, None]))
    if name == "tcd":
        below = (1 - GAMMA) * np.append(t[1:], 0.0)
        return times._replace(arrival=at(np.floor(below) if table_times else below))
    if name not in ("ddim", "pndm"):
        return times
    arrival = Time(times.t[1:], times.alpha[1:], times.sigma[1:])
    if table_times:  # the classes step down by floor(T / N) whatever the spacing, and go on as if from entry i + 1
        down = t - step
        arrival = process.time(np.maximum(down, 0), np.where(down < 0, process.final(), process.level(down)))
    if name == "ddim":
        return times._replace(arrival=arrival)
    following = np.append(t[1:], t[-1:])
    if not skips_prk(process.config):
        half = [following + step // 2, t - step // 2] if table_times else [(t + following) / 2] * 2
        middle = at(np.stack(half, 1))
    elif table_times:
        middle = at((following + step)[:, None])
    else:
        middle = Time(times.t[:-1, None], times.alpha[:-1, None], times.sigma[:-1, None])
    return times._replace(arrival=arrival, middle=middle)
