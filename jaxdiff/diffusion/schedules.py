"""Noise schedules: the weights of image and noise at each time.

The process mixes a clean x0 with unit Gaussian noise eps,

    x_t = alpha_t x0 + sigma_t eps                                                        (1)

and a schedule is the pair of tables alpha, sigma. Variance-preserving ones are made from the training betas,

    alpha_t^2 = prod_{s <= t} (1 - beta_s),   sigma_t^2 = 1 - alpha_t^2,   t = 0 … T-1    (2)
    beta linear from beta_start to beta_end                          "linear"             (3)
    sqrt(beta) linear                                                "scaled_linear"      (4)
    alpha_t^2 ~ cos^2(pi/2 (t/T + 0.008) / 1.008), beta <= 0.999     "squaredcos_cap_v2"  (5)

(Ho et al. 2020, equation 4 and section 4; Rombach et al. 2022; Nichol & Dhariwal 2021, equation 17). They may be
rescaled to zero terminal SNR (Lin et al. 2023, algorithm 1),

    alpha_t <- (alpha_t - alpha_{T-1}) alpha_0 / (alpha_0 - alpha_{T-1})                  (6)

Rectified flow ("flow"; Liu et al. 2023, equation 1) is a straight line, and its times may be shifted towards noise
(Esser et al. 2024, equation 23),

    alpha_t = 1 - t/T,   sigma_t = t/T,   t in [0, T]                                     (7)
    u <- s u / (1 + (s - 1) u),   u = t/T                                                 (8)
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxdiff.config import SchedulerConfig
from jaxdiff.config.scheduler import BETA_SCHEDULES
from jaxdiff.typing import Array

# Prefixes of diffusers' scheduler classes whose process is neither made from betas nor the flow (7).
UNSUPPORTED_CLASSES = (
    "Amused",
    "CMStochastic",
    "CogVideoX",
    "Cosine",
    "DDPMWuerstchen",
    "EDM",
    "IPNDM",
    "SCM",
    "ScoreSde",
    "VQ",
)


class Time(NamedTuple):
    """A time of the process, equation (1); with arrays [N + 1], a time grid from noise to image."""

    t: Array  # timestep in training steps, the network's input; may be fractional
    alpha: Array  # weight of the image
    sigma: Array  # weight of the noise
    # For grids only:
    step_end: "Time | None" = None  # [N], where step i ends if not at entry i + 1, as in diffusers' DDIM (times.py)
    substeps: "Time | None" = None  # [N, K], times that some schedulers visit within step i
    steps: Array | int | None = None  # N of a padded grid, may be traced; None: number of entries - 1


class NoiseSchedule(NamedTuple):
    """Tables of equation (1) in float32, at t = 0, 1, 2, …: [T] from betas, [T + 1] for a flow."""

    alpha: np.ndarray
    sigma: np.ndarray


def is_flow(config: SchedulerConfig) -> bool:
    """Whether the process is a rectified flow, equation (7)."""
    return config.beta_schedule == "flow" or config.class_name.startswith("FlowMatch")


def betas(config: SchedulerConfig) -> np.ndarray:
    """The training betas, [T] float64, before any rescaling: equations (3) to (5), or `trained_betas`.

    Raises:
        ValueError: an unknown `beta_schedule`, betas outside [0, 1], or fewer `trained_betas` than timesteps.
    """
    steps, start, end = config.num_train_timesteps, config.beta_start, config.beta_end
    values = (start, end) if config.trained_betas is None else config.trained_betas
    if not values or not all(0 <= beta <= 1 for beta in values):
        names = "beta_start and beta_end" if config.trained_betas is None else "trained_betas"
        raise ValueError(f"{names} (scheduler_config.json) must be from 0 to 1, at least one: take the model's own.")
    if config.trained_betas is not None:
        if len(values) < steps:
            raise ValueError(
                f"trained_betas (scheduler_config.json) holds {len(values)} numbers for {steps} num_train_timesteps: "
                "take the model's own."
            )
        return np.asarray(config.trained_betas, np.float64)
    if config.beta_schedule == "linear":
        return np.linspace(start, end, steps)
    if config.beta_schedule == "scaled_linear":
        return np.linspace(start**0.5, end**0.5, steps) ** 2
    if config.beta_schedule == "squaredcos_cap_v2":
        alpha_squared = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
        return np.minimum(1 - alpha_squared[1:] / alpha_squared[:-1], 0.999)
    raise ValueError(f"beta_schedule {config.beta_schedule!r} is unknown; known are {', '.join(BETA_SCHEDULES)}.")


def noise_schedule(config: SchedulerConfig) -> NoiseSchedule:
    """The tables of a config, computed in float64 and rounded once to float32.

    Raises:
        ValueError: a scheduler class whose process is not supported, or see `betas`.

    >>> schedule = noise_schedule(SchedulerConfig(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012))
    >>> [round(float(table[-1]), 4) for table in schedule]
    [0.0683, 0.9977]
    >>> noise_schedule(SchedulerConfig(beta_schedule="flow", num_train_timesteps=4)).sigma.tolist()
    [0.0, 0.25, 0.5, 0.75, 1.0]
    """
    if config.class_name.startswith(UNSUPPORTED_CLASSES):
        raise ValueError(
            f"{config.class_name} (scheduler_config.json) is not supported: take a model whose scheduler has betas or "
            "is a flow."
        )
    if is_flow(config):
        sigma = np.arange(config.num_train_timesteps + 1) / config.num_train_timesteps
        alpha = 1 - sigma
    else:
        alpha = np.sqrt(np.cumprod(1 - betas(config)))
        if config.rescale_betas_zero_snr:
            alpha = (alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))
        sigma = np.sqrt(1 - alpha**2)
    return NoiseSchedule(alpha.astype(np.float32), sigma.astype(np.float32))


def at(schedule: NoiseSchedule, t: Array | float) -> Time:
    """The `Time` at timesteps t of any shape, in training steps.

    At fractional t, alpha and sigma are interpolated linearly; t outside the table is clamped to its ends.

    >>> flow = noise_schedule(SchedulerConfig(beta_schedule="flow"))
    >>> [float(v) for v in at(flow, 250.0)[:3]]
    [250.0, 0.75, 0.25]
    """
    t = jnp.asarray(t, jnp.float32)
    last = len(schedule.alpha) - 1
    low = jnp.clip(jnp.floor(t), 0, max(last - 1, 0)).astype(jnp.int32)
    weight = jnp.clip(t - low, 0.0, 1.0)

    def interpolate(table: Array) -> Array:
        return (1 - weight) * table[low] + weight * table[jnp.minimum(low + 1, last)]

    return Time(t, interpolate(jnp.asarray(schedule.alpha)), interpolate(jnp.asarray(schedule.sigma)))


def shift_time(t: Any, config: SchedulerConfig, mu: float | None = None) -> Any:
    """Times of a flow in [0, T], shifted towards noise by the config's `shift`: equation (8).

    Sampling applies it to its grid, training to its random times; a shift of 1 changes nothing.

    Args:
        t: timesteps of any shape.
        mu: for a config with `use_dynamic_shifting`, whose `shift` has no effect: s = exp(mu), or s = mu if its
            `time_shift_type` is "linear"; None: no shift.
    """
    u, shift = t / config.num_train_timesteps, config.shift
    if config.use_dynamic_shifting:
        shift = 1.0 if mu is None else np.exp(mu) if config.time_shift_type == "exponential" else mu
    return config.num_train_timesteps * shift * u / (1 + (shift - 1) * u)


def dynamic_shift(config: SchedulerConfig, patches: int) -> float:
    """The mu of an image of `patches` 2 x 2 patches of latents, linear in their number (FLUX.1, SD 3, Z-Image)."""
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    return config.base_shift + slope * (patches - config.base_image_seq_len)


def empirical_shift(patches: int, steps: int) -> float:
    """The mu of an image of `patches` patches sampled in `steps` steps, as FLUX.2's authors fitted it.

    >>> round(empirical_shift(4096, 50), 4), round(empirical_shift(5000, 4), 4)
    (2.0234, 1.303)
    """
    at_200 = 0.00016927 * patches + 0.45666666
    if patches > 4300:
        return at_200
    at_10 = 8.73809524e-05 * patches + 1.89833333
    return at_200 + (steps - 200) * (at_200 - at_10) / 190
