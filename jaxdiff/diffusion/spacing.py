"""Spacings of the points of a time grid, in numpy float64. times.py says which scheduler uses which spacing.

With T training steps and N sampling steps, i = 0 … N-1 (Lin et al. 2023, table 2):

    "linspace"     t_i = (T - 1) (1 - i / (N - 1))                                                          (1)
    "leading"      t_i = (N - 1 - i) floor(T / N) + steps_offset                                            (2)
    "trailing"     t_i = round(T - i T / N) - 1                                                             (3)
    distilled      every n-th of the M timesteps j T / M - 1 that a model was distilled at                  (4)

The others space noise levels, s = sigma / alpha (on a flow, s = sigma), from s_0 to s_{N-1}, u = i / (N - 1):

    "karras"       s_i = (s_0^(1/7) + u (s_{N-1}^(1/7) - s_0^(1/7)))^7                                      (5)
    "exponential"  log s_i = log s_0 + u (log s_{N-1} - log s_0)                                            (6)
    "beta"         s_i = s_{N-1} + F(1 - u) (s_0 - s_{N-1}), F the quantiles of Beta(0.6, 0.6)              (7)
    "ays"          a table of eleven levels, log s interpolated linearly to N + 1, the last left out        (8)

(4) Luo et al. 2023, section 4.3; (5) Karras et al. 2022, equation 5; (7) Lee et al. 2024, section 4; (8) Sabour et al.
2024, "Align Your Steps", whose published tables for Stable Diffusion 1.5 and SDXL are these (howto page of the paper).
"""

import numpy as np

from jaxdiff.config import SchedulerConfig
from jaxdiff.errors import ArgumentError

TIMESTEP_SPACINGS = ("leading", "trailing", "linspace")
AYS = {
    "ays": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "ays_sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
}
SIGMA_SPACINGS = ("karras", "exponential", "beta", *AYS)
SPACINGS = (*TIMESTEP_SPACINGS, *SIGMA_SPACINGS)


def spaced_sigmas(name: str, first: float, last: float, steps: int) -> np.ndarray:
    """Noise levels [N] from first down to last, equations (5) to (8); the tables of (8) have their own ends."""
    if name in AYS:
        table = np.log(AYS[name])
        return np.exp(np.interp(np.linspace(0, 1, steps + 1), np.linspace(0, 1, len(table)), table))[:-1]
    u = np.linspace(0, 1, steps)
    if name == "karras":
        return (first ** (1 / 7) + u * (last ** (1 / 7) - first ** (1 / 7))) ** 7
    if name == "exponential":
        return np.exp(np.log(first) + u * (np.log(last) - np.log(first)))
    from scipy.special import betaincinv  # here: importing it takes longer than the rest of this module

    return last + betaincinv(0.6, 0.6, 1 - u) * (first - last)


def spaced_timesteps(
    config: SchedulerConfig, steps: int, spacing: str, drop_last_point: bool, fractional: bool
) -> np.ndarray:
    """Timesteps [N], equations (1) to (3), by the numpy functions that diffusers calls, so that ties round alike.

    Args:
        drop_last_point: whether (1) and (2) make N + 1 points and drop the last.
        fractional: whether the timesteps of (1) stay unrounded.
    """
    total, points = config.num_train_timesteps, steps + drop_last_point
    if spacing == "linspace":
        t = np.linspace(0, total - 1, points)[::-1]
        t = t if fractional else t.round()
    elif spacing == "leading":
        t = (np.arange(points, dtype=float) * (total // points))[::-1] + config.steps_offset
        if t[0] > total - 1:
            raise ArgumentError(
                "steps",
                f"{steps} with steps_offset {config.steps_offset} reach beyond the {total} of training: "
                "take fewer, or spacing trailing.",
            )
    else:
        t = np.arange(total, 0, -total / steps).round() - 1
    return t[:steps]


def distilled_timesteps(config: SchedulerConfig, steps: int, strength: float = 1.0) -> np.ndarray:
    """Timesteps [N], equation (4), of the floor(M strength) timesteps with the least noise among the M."""
    distilled = config.original_inference_steps
    if not 1 <= distilled <= config.num_train_timesteps:
        raise ValueError(f"original_inference_steps {distilled} must be from 1 to {config.num_train_timesteps}.")
    if not 0 < strength <= 1:
        raise ArgumentError("strength", f"{strength} must be in (0, 1].")
    available = int(distilled * strength)
    if steps > available:
        source = "of the distillation (original_inference_steps)"
        source = source if strength == 1 else f"that strength {strength} leaves {source}"
        raise ArgumentError("steps", f"{steps} is more than the {available} {source}: take fewer.")
    t = np.arange(available, 0, -1.0) * (config.num_train_timesteps // distilled) - 1
    return t[np.floor(np.linspace(0, available, steps, endpoint=False)).astype(int)]
