"""Time grids: the moments at which a scheduler calls the network, as diffusers' class of that scheduler lays them.

With T training steps and N sampling steps, i = 0 … N-1 (Lin et al. 2023, table 2):

    "linspace"   t_i = (T - 1) (1 - i / (N - 1))                                                            (1)
    "leading"    t_i = (N - 1 - i) floor(T / N) + steps_offset                                              (2)
    "trailing"   t_i = round(T - i T / N) - 1                                                               (3)
    "karras"     s_i = (s_0^(1/7) + i / (N - 1) (s_{N-1}^(1/7) - s_0^(1/7)))^7,  s = sigma / alpha          (4)

(4) is equation 5 of Karras et al. 2022; its ends are those of the class's other grid, or of the whole table, and its
times are found in the table by interpolating log s. What else differs from class to class is in `RULES`.

A flow has grids of its own, evenly spread over sigma = t / T from 1 and then shifted (schedules.py, equation 8).
"""

from typing import NamedTuple

import numpy as np

from jaxdiff.config import SchedulerConfig
from jaxdiff.diffusion.schedules import Time, is_flow, noise_schedule, shift_time

SPACINGS = ("leading", "trailing", "linspace", "karras")


class Rule(NamedTuple):
    """How one class of diffusers lays out its grid."""

    spacing: str  # where scheduler_config.json names none
    final: str  # where the last step ends: the config key that says so, or "zero" for a clean sample always
    fractional: bool = False  # linspace and karras times keep their fraction
    scaled: bool = False  # starts from noise times sigma_0 rather than 1, but for leading grids
    karras: bool = False  # knows `use_karras_sigmas`
    finite: bool = False  # a zero-SNR table ends at alpha^2 = 2**-24 rather than 0
    spare: int = 0  # points laid out beyond N and dropped from the end; 1 also takes karras from the whole table


RULES: dict[str, Rule] = {
    "ddim": Rule("leading", "set_alpha_to_one"),
    "ddpm": Rule("leading", "zero"),
    "euler": Rule("linspace", "final_sigmas_type", fractional=True, scaled=True, karras=True, finite=True),
    "euler_ancestral": Rule("linspace", "zero", fractional=True, scaled=True, finite=True),
    "heun": Rule("linspace", "zero", fractional=True, scaled=True, karras=True),
    "dpmpp_2m": Rule("linspace", "final_sigmas_type", karras=True, finite=True, spare=1),
}

# Scheduler names by diffusers class; any other class is drawn with dpmpp_2m.
CLASSES = {
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "EulerDiscreteScheduler": "euler",
    "FlowMatchEulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
    "HeunDiscreteScheduler": "heun",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
}


def default_scheduler(config: SchedulerConfig) -> str:
    """The scheduler that a config's own class names; "dpmpp_2m" for classes that have no counterpart here.

    >>> default_scheduler(SchedulerConfig(class_name="EulerDiscreteScheduler"))
    'euler'
    """
    return CLASSES.get(config.class_name, "dpmpp_2m")


def time_grid(
    config: SchedulerConfig, steps: int, scheduler: str = "ddim", spacing: str | None = None
) -> tuple[Time, np.float32]:
    """The grid of a scheduler, and the scale of the unit noise it starts from.

    Args:
        config: of the model's process and of the grid.
        steps: N.
        scheduler: a name of `SCHEDULERS`, whose diffusers class is followed.
        spacing: "leading", "trailing", "linspace" or "karras" (over the grid that the config names); None takes what
            the config says, else the default of the class.

    Returns:
        Time with float32 numpy fields [N + 1], from noise to picture, and the scale: sample from scale * noise.

    Raises:
        ValueError: an unknown scheduler or spacing, or more steps than the process has; the message says which.

    >>> times, scale = time_grid(SchedulerConfig(steps_offset=1), 4)
    >>> times.t.tolist(), float(times.sigma[-1]), float(scale)
    ([751.0, 501.0, 251.0, 1.0, 0.0], 0.0, 1.0)
    """
    if scheduler not in RULES:
        raise ValueError(f"scheduler {scheduler!r} is unknown; known are {', '.join(RULES)}.")
    rule, flow = RULES[scheduler], is_flow(config)
    if steps < 1:
        raise ValueError(f"steps {steps} must be at least 1.")
    karras = spacing == "karras" or (spacing is None and config.use_karras_sigmas and (rule.karras or flow))
    named = None if spacing == "karras" else spacing
    spacing = named or config.timestep_spacing or ("linspace" if flow else rule.spacing)
    if spacing not in SPACINGS[:3]:
        known = f"{', '.join(SPACINGS)} (which a config says by use_karras_sigmas)"
        raise ValueError(f"spacing {spacing!r} is unknown; known are {known}.")
    if flow:
        times = _flow_grid(config, steps, rule, spacing, karras)
        arrival = None
    else:
        times, arrival = _table_grid(config, steps, rule, spacing, karras)
    if not (np.diff(times.sigma[:-1] / np.maximum(times.alpha[:-1], 1e-9)) < 0).all():
        raise ValueError(
            f"{steps} steps are more than {spacing} spacing of {scheduler} has room for: take fewer steps."
        )
    if times.alpha[0] == 0 and config.prediction_type == "epsilon":
        raise ValueError(
            'prediction_type "epsilon" says nothing of x0 where the picture has no weight, at the first step of this '
            'grid: take spacing "leading", or a model of another prediction type.'
        )
    if scheduler == "ddim":
        # Given always, so that compiled programs do not depend on the spacing.
        times = times._replace(arrival=arrival or Time(times.t[1:], times.alpha[1:], times.sigma[1:]))
    scale = np.float32(times.sigma[0]) if rule.scaled and spacing != "leading" else np.float32(1)
    return times, scale


def _spaced(config: SchedulerConfig, steps: int, rule: Rule, spacing: str) -> np.ndarray:
    """Times [N] by equations (1) to (3). numpy's own functions are called as diffusers does: ties round alike."""
    total, points = config.num_train_timesteps, steps + rule.spare
    if spacing == "linspace":
        t = np.linspace(0, total - 1, points)[::-1]
        t = t if rule.fractional else t.round()
    elif spacing == "leading":
        t = (np.arange(points, dtype=float) * (total // points))[::-1] + config.steps_offset
        if t[0] > total - 1:
            raise ValueError(
                f"{steps} steps with steps_offset {config.steps_offset} reach beyond the {total} of training: "
                "take fewer steps, or spacing trailing."
            )
    else:
        t = np.arange(total, 0, -total / steps).round() - 1
    return t[:steps]


def _karras(first: float, last: float, steps: int) -> np.ndarray:
    """Equation (4), [N]."""
    return (first ** (1 / 7) + np.linspace(0, 1, steps) * (last ** (1 / 7) - first ** (1 / 7))) ** 7


def _from_ratio(t: np.ndarray, ratio: np.ndarray) -> Time:
    """Variance-preserving times in float32 from s = sigma / alpha, which may be 0 or infinite."""
    with np.errstate(divide="ignore"):
        alpha, sigma = 1 / np.sqrt(1 + ratio**2), 1 / np.sqrt(1 + ratio**-2.0)
    return Time(t.astype(np.float32), alpha.astype(np.float32), sigma.astype(np.float32))


def _table_grid(
    config: SchedulerConfig, steps: int, rule: Rule, spacing: str, karras: bool
) -> tuple[Time, Time | None]:
    """Grid of a process given by betas; and where each step arrives, if not at the next entry."""
    schedule = noise_schedule(config)
    alpha, sigma = (a.astype(np.float64) for a in schedule)
    if config.rescale_betas_zero_snr and (rule.finite or karras):
        alpha[-1] = 2.0**-12
    with np.errstate(divide="ignore"):
        table = sigma / alpha
    index = np.arange(len(table))
    t = _spaced(config, steps, rule, spacing)
    ratio = np.interp(t, index, table)
    if karras:
        ratio = _karras(table[-1], table[0], steps) if rule.spare else _karras(ratio[0], ratio[-1], steps)
        t = np.interp(np.log(ratio), np.log(table), index)
        if rule.spare:  # DPM++ keeps the levels, and tells the network whole times
            t = np.floor(t) if config.beta_schedule == "squaredcos_cap_v2" else t.round()
    final = 0.0 if _ends_clean(config, rule) else table[0]
    times = _from_ratio(np.append(t, 0), np.append(ratio, final))
    if rule.final != "set_alpha_to_one" or karras:
        return times, None
    # diffusers' DDIM steps down by floor(T / N) whatever the spacing, and goes on from there as if from entry i + 1.
    t = t - config.num_train_timesteps // steps
    ratio = np.where(t < 0, final, table[np.maximum(t, 0).astype(int)])
    return times, _from_ratio(np.maximum(t, 0), ratio)


def _ends_clean(config: SchedulerConfig, rule: Rule) -> bool:
    """Whether the last step goes to a clean sample, or to the first entry of the table."""
    if rule.final == "set_alpha_to_one":
        return config.set_alpha_to_one is not False
    if rule.final == "final_sigmas_type" and config.final_sigmas_type != "zero":
        if config.final_sigmas_type == "sigma_min":
            return False
        raise ValueError(
            f'final_sigmas_type {config.final_sigmas_type!r} is unknown; known are "zero" and "sigma_min".'
        )
    return True


def _flow_grid(config: SchedulerConfig, steps: int, rule: Rule, spacing: str, karras: bool) -> Time:
    """Grid of a rectified flow, t = T sigma.

    linspace is that of FlowMatchEulerDiscreteScheduler; dpmpp_2m's, of DPMSolverMultistepScheduler with flow sigmas.
    """
    total = float(config.num_train_timesteps)
    if spacing == "leading":
        raise ValueError('spacing "leading" does not start from pure noise, as a flow must: take linspace or trailing.')
    if spacing == "trailing":
        t = total * (1 - np.arange(steps) / steps)
    elif rule.spare:
        t = total * (1 - np.linspace(1, 1 / total, steps + 1))[:0:-1]
    else:
        # The class shifts its range at construction and the points of it again.
        t = np.linspace(total, shift_time(1.0, config), steps)
    t = shift_time(t, config)
    if karras:
        t = total * _karras(t[0] / total, t[-1] / total, steps)
    sigma = np.append(t, 0) / total
    t = np.floor(t) if rule.spare else t
    return Time(np.append(t, 0).astype(np.float32), (1 - sigma).astype(np.float32), sigma.astype(np.float32))
