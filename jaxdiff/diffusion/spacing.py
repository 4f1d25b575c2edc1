"""Where the points of a time grid lie, in numpy float64. times.py says which scheduler takes which.

With T training steps and N sampling steps, i = 0 … N-1 (Lin et al. 2023, table 2):

    "linspace"     t_i = (T - 1) (1 - i / (N - 1))                                                          (1)
    "leading"      t_i = (N - 1 - i) floor(T / N) + steps_offset                                            (2)
    "trailing"     t_i = round(T - i T / N) - 1                                                             (3)
    distilled      every n-th of the times T / M, 2 T / M, … less 1, of the M steps of a distillation       (4)

The others spread noise levels, s = sigma / alpha (on a flow, s = sigma), from s_0 to s_{N-1}, u = i / (N - 1):

    "karras"       s_i = (s_0^(1/7) + u (s_{N-1}^(1/7) - s_0^(1/7)))^7                                      (5)
    "exponential"  log s_i = log s_0 + u (log s_{N-1} - log s_0)                                            (6)
    "beta"         s_i = s_{N-1} + F(1 - u) (s_0 - s_{N-1}), F the quantiles of Beta(0.6, 0.6)              (7)
    "ays"          a table of eleven levels, log s interpolated linearly to N + 1, without the last         (8)

(4) Luo et al. 2023, section 4.3; (5) Karras et al. 2022, equation 5; (7) Lee et al. 2024, section 4; (8) Sabour et al.
2024, "Align Your Steps", whose published tables for Stable Diffusion 1.5 and SDXL are these (howto page of the paper).
"""

import numpy as np

from jaxdiff.errors import ArgumentError
from jaxdiff.scheduler_config import SchedulerConfig

STEPS = ("leading", "trailing", "linspace")  # by time
AYS = {
    "ays": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "ays_sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
}
LEVELS = ("karras", "exponential", "beta", *AYS)  # by noise level
SPACINGS = (*STEPS, *LEVELS)


def spread(name: str, first: float, last: float, steps: int) -> np.ndarray:
    """Noise levels [N] from first down to last, by equations (5) to (8); those of (8) have their own ends."""
    if name in AYS:
        table = np.log(AYS[name])
        return np.exp(np.interp(np.linspace(0, 1, steps + 1), np.linspace(0, 1, len(table)), table))[:-1]
    u = np.linspace(0, 1, steps)
    if name == "karras":
        return (first ** (1 / 7) + u * (last ** (1 / 7) - first ** (1 / 7))) ** 7
    if name == "exponential":
        return np.exp(np.log(first) + u * (np.log(last) - np.log(first)))
    from scipy.special import betaincinv  # here, for importing it takes longer than all else of this module

    return last + betaincinv(0.6, 0.6, 1 - u) * (first - last)


def spaced(config: SchedulerConfig, steps: int, spacing: str, spare: int, fractional: bool) -> np.ndarray:
    """Times [N] by equations (1) to (3). numpy's own functions are called as diffusers does: ties round alike.

    Args:
        spare: points laid out beyond N and dropped from the end.
        fractional: whether the times of (1) keep their fraction.
    """
    total, points = config.num_train_timesteps, steps + spare
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


def distilled(config: SchedulerConfig, steps: int, strength: float = 1.0) -> np.ndarray:
    """Times [N] by equation (4), over the part `strength` of the M steps that is nearest to the picture."""
    taught = config.original_inference_steps
    if not 1 <= taught <= config.num_train_timesteps:
        raise ValueError(f"original_inference_steps {taught} must be from 1 to {config.num_train_timesteps}.")
    if not 0 < strength <= 1:
        raise ArgumentError("strength", f"{strength} must be in (0, 1].")
    left = int(taught * strength)
    if steps > left:
        of = "of the distillation (original_inference_steps)"
        of = of if strength == 1 else f"that strength {strength} leaves {of}"
        raise ArgumentError("steps", f"{steps} are more than the {left} {of}: take fewer.")
    t = np.arange(left, 0, -1.0) * (config.num_train_timesteps // taught) - 1
    return t[np.floor(np.linspace(0, left, steps, endpoint=False)).astype(int)]
