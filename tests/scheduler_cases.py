"""What the schedulers are compared with diffusers on: configs, a stand-in for the network, noise. Needs no PyTorch."""

import dataclasses
from typing import NamedTuple

import jax
import numpy as np

from jaxdiff.config import SchedulerConfig
from jaxdiff.diffusion.sampling import sample_keys, step_keys

SHAPE = (2, 6)  # [B, D]
KEY = 7
SD1 = SchedulerConfig(
    beta_schedule="scaled_linear",
    beta_start=0.00085,
    beta_end=0.012,
    steps_offset=1,
    set_alpha_to_one=False,
    clip_sample=False,
)
ZERO_SNR = dataclasses.replace(SD1, rescale_betas_zero_snr=True, prediction_type="v_prediction")
FLOW = SchedulerConfig(
    class_name="FlowMatchEulerDiscreteScheduler", beta_schedule="flow", prediction_type="flow_prediction"
)
CONFIGS = {
    "sd1": SD1,
    "sd2": dataclasses.replace(SD1, prediction_type="v_prediction"),
    "defaults": SchedulerConfig(),  # linear, clipped where the class clips by default
    "clipped": dataclasses.replace(SD1, clip_sample=True, clip_sample_range=0.7, prediction_type="v_prediction"),
    # The betas' cap of 0.999 leaves alpha = 5e-5 at the end: epsilon would be divided by that.
    "cosine": SchedulerConfig(beta_schedule="squaredcos_cap_v2", prediction_type="sample"),
    "zero_snr": ZERO_SNR,
    "trained": SchedulerConfig(
        trained_betas=tuple(np.geomspace(1e-3, 0.3, 40).tolist()), num_train_timesteps=40, prediction_type="sample"
    ),
    "sigma_min": dataclasses.replace(SD1, final_sigmas_type="sigma_min", lower_order_final=False),
    "euler_at_final": dataclasses.replace(SD1, final_sigmas_type="sigma_min", euler_at_final=True),
    "karras": dataclasses.replace(SD1, use_karras_sigmas=True),
    "karras_cosine": SchedulerConfig(
        beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", use_karras_sigmas=True
    ),
    "fixed_large": dataclasses.replace(SD1, variance_type="fixed_large"),
    "flow": FLOW,
    "flow_shift": dataclasses.replace(FLOW, shift=3.0),
    "flow_karras": dataclasses.replace(FLOW, use_karras_sigmas=True),
}
ONLY = {  # configs that say something to some schedulers only
    "sigma_min": ("euler", "dpmpp_2m"),
    "euler_at_final": ("dpmpp_2m",),
    "clipped": ("ddim", "ddpm", "heun"),
    "karras": ("euler", "heun", "dpmpp_2m"),
    "karras_cosine": ("euler", "heun", "dpmpp_2m"),
    "fixed_large": ("ddpm",),
    "flow": ("euler", "dpmpp_2m"),
    "flow_shift": ("euler", "dpmpp_2m"),
    "flow_karras": ("euler",),
}
NAMES = ("ddim", "ddpm", "euler", "euler_ancestral", "heun", "dpmpp_2m")


class Case(NamedTuple):
    config: str
    scheduler: str
    spacing: str | None
    steps: int
    eta: float = 0.0  # ddim only

    def __str__(self) -> str:
        return "-".join(str(v) for v in self)

    @property
    def values(self) -> SchedulerConfig:
        config = CONFIGS[self.config]
        return config if self.spacing is None else dataclasses.replace(config, timestep_spacing=self.spacing)


def comparable(config: str, scheduler: str) -> bool:
    """Whether diffusers knows the pair, and it is not the same as another."""
    if config in ONLY:
        return scheduler in ONLY[config]
    if scheduler == "euler_ancestral" and CONFIGS[config].prediction_type == "sample":
        return False  # not implemented there
    return (scheduler, config) != ("heun", "zero_snr")  # its class has no rescaling


def cases() -> list[Case]:
    found = []
    for config in CONFIGS:
        for name in NAMES:
            # diffusers' float32 x / alpha keeps four digits at cosine's first sigma / alpha, 2e4: grids are compared.
            if not comparable(config, name) or ("cosine" in config and name in ("euler", "heun")):
                continue
            if config == "karras_cosine":
                continue  # dpmpp_2m is told t = 998 first, by a rounding error there
            spacings = (None,) if config.startswith("flow") else (None, "leading", "trailing", "linspace")
            # Under and over the 15 steps of `lower_order_final`; 7 does not divide the steps of training.
            found += [Case(config, name, s, steps) for s in spacings for steps in (7, 20)]
    found += [Case(config, "ddim", "trailing", 7, eta) for config in ("sd1", "defaults") for eta in (0.4, 1.0)]
    return found


def network(x, t, xp):
    """A smooth stand-in for the network, in the arithmetic of numpy, jax.numpy or torch.

    Rising in x, it contracts the paths it guides, so that rounding errors do not grow along them.
    """
    return 0.9 * xp.tanh(0.8 * x) + 0.2 * xp.sin(0.013 * t + 3 * x)


def start() -> np.ndarray:
    """Unit noise [B, D] to start from."""
    return np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)


def noise(step: int) -> np.ndarray:
    """The noise [B, D] that `sample` under the key `KEY` draws at a step."""
    keys = step_keys(sample_keys(jax.random.key(KEY), SHAPE[0]), step)
    return np.array(jax.vmap(lambda key: jax.random.normal(key, SHAPE[1:]))(keys))
