"""What the schedulers are compared with diffusers on: configs, a stand-in for the network, noise. Needs no PyTorch."""

import dataclasses
from typing import NamedTuple

import jax
import numpy as np

from jaxdiff.config import SchedulerConfig
from jaxdiff.diffusion.base import noise_like
from jaxdiff.diffusion.sampling_loop import sample_keys, step_keys

SHAPE = (2, 3, 2)  # [B, ...]
MASK = np.array([[True, False], [False, True], [True, True]])  # of a sample, true where it is redrawn
KEY = 7
SD1 = SchedulerConfig(
    beta_schedule="scaled_linear",
    beta_start=0.00085,
    beta_end=0.012,
    steps_offset=1,
    set_alpha_to_one=False,
    clip_sample=False,
    skip_prk_steps=True,
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
    "exponential": dataclasses.replace(SD1, use_exponential_sigmas=True),
    "beta": dataclasses.replace(SD1, use_beta_sigmas=True),
    "ends": dataclasses.replace(SD1, use_karras_sigmas=True, sigma_max=20.0, sigma_min=0.01),
    "lu": dataclasses.replace(SD1, use_lu_lambdas=True),
    "log_linear": dataclasses.replace(SD1, interpolation_type="log_linear"),
    "threshold": dataclasses.replace(
        SD1, thresholding=True, dynamic_thresholding_ratio=0.7, sample_max_value=1.2, prediction_type="sample"
    ),
    "fixed_large": dataclasses.replace(SD1, variance_type="fixed_large"),
    "order_1": dataclasses.replace(SD1, solver_order=1, solver_type="bh1", final_sigmas_type="sigma_min"),
    "order_3": dataclasses.replace(SD1, solver_order=3),
    "order_3_open": dataclasses.replace(
        SD1, solver_order=3, final_sigmas_type="sigma_min", lower_order_final=False, prediction_type="v_prediction"
    ),
    "heun_type": dataclasses.replace(SD1, solver_type="heun"),
    "bh1": dataclasses.replace(SD1, solver_type="bh1", disable_corrector=(0, 3), final_sigmas_type="sigma_min"),
    "noise": dataclasses.replace(
        SD1, predict_x0=False, algorithm_type="dpmsolver", final_sigmas_type="sigma_min", solver_order=3
    ),
    "prk": dataclasses.replace(SD1, skip_prk_steps=False),
    "prk_v": dataclasses.replace(SD1, skip_prk_steps=False, prediction_type="v_prediction", set_alpha_to_one=True),
    "distilled": dataclasses.replace(SD1, original_inference_steps=30, timestep_scaling=0.01, set_alpha_to_one=None),
    "flow": FLOW,
    "flow_shift": dataclasses.replace(FLOW, shift=3.0),
    "flow_karras": dataclasses.replace(FLOW, use_karras_sigmas=True),
    "flow_exponential": dataclasses.replace(FLOW, use_exponential_sigmas=True),
    "flow_beta": dataclasses.replace(FLOW, use_beta_sigmas=True, shift=2.0),
}
SOLVERS = ("dpmpp_2m", "dpmpp_2m_sde", "unipc")
ONLY = {  # configs that say something to some schedulers only
    "sigma_min": ("euler", *SOLVERS),
    "euler_at_final": ("dpmpp_2m", "dpmpp_2m_sde"),
    "clipped": ("ddim", "ddpm", "heun", "lcm"),
    "karras": ("euler", "heun", "lms", "dpmpp_sde", *SOLVERS),
    "karras_cosine": ("euler", "heun", *SOLVERS),
    "exponential": ("euler", "lms", "dpmpp_2m", "unipc"),
    "beta": ("heun", "dpmpp_sde", "dpmpp_2m", "unipc"),
    "ends": ("euler", "unipc"),
    "lu": ("dpmpp_2m",),
    "log_linear": ("euler",),
    "threshold": ("ddim", "ddpm", "lcm", *SOLVERS),
    "fixed_large": ("ddpm",),
    "order_1": SOLVERS,
    "order_3": SOLVERS,
    "order_3_open": SOLVERS,
    "heun_type": ("dpmpp_2m", "dpmpp_2m_sde"),
    "bh1": ("unipc",),
    "noise": ("dpmpp_2m", "unipc"),
    "prk": ("pndm",),
    "prk_v": ("pndm",),
    "distilled": ("lcm", "tcd"),
    "flow": ("euler", "heun", *SOLVERS),
    "flow_shift": ("euler", "heun", *SOLVERS),
    "flow_karras": ("euler",),
    "flow_exponential": ("euler",),
    "flow_beta": ("euler",),
}
CLASSES = {  # diffusers' class of each scheduler; dpmpp_2s_ancestral has none
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "pndm": "PNDMScheduler",
    "lms": "LMSDiscreteScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "dpmpp_2m_sde": "DPMSolverMultistepScheduler",
    "dpmpp_sde": "DPMSolverSDEScheduler",
    "unipc": "UniPCMultistepScheduler",
    "lcm": "LCMScheduler",
    "tcd": "TCDScheduler",
}
NAMES = (*CLASSES, "dpmpp_2s_ancestral")
NOT_RESCALED = ("heun", "pndm", "lms", "dpmpp_sde")  # their classes know no zero SNR
NO_SAMPLE = ("euler_ancestral", "pndm", "dpmpp_sde")  # nor that prediction type


class Case(NamedTuple):
    config: str
    scheduler: str
    spacing: str | None
    steps: int
    eta: float = 0.0  # ddim only
    start: int = 0  # steps left out at the beginning, as for an image that is redrawn
    masked: bool = False  # the image is kept where `MASK` is false

    def __str__(self) -> str:
        redrawn = f"-{self.start}" * (self.start > 0) + "-masked" * self.masked
        return "-".join(str(v) for v in self[:5]) + redrawn

    @property
    def values(self) -> SchedulerConfig:
        """The config, of the scheduler's own class but for a flow."""
        config = CONFIGS[self.config]
        if config.beta_schedule != "flow":
            config = dataclasses.replace(config, class_name=CLASSES[self.scheduler])
        if self.scheduler == "dpmpp_2m_sde":
            config = dataclasses.replace(config, algorithm_type="sde-dpmsolver++")
        return config if self.spacing is None else dataclasses.replace(config, timestep_spacing=self.spacing)


def comparable(config: str, scheduler: str) -> bool:
    """Whether diffusers knows the pair, and it is not the same as another."""
    if scheduler not in CLASSES or scheduler not in ONLY.get(config, CLASSES):
        return False
    if CONFIGS[config].prediction_type == "sample" and scheduler in NO_SAMPLE:
        return False
    if config == "trained" and scheduler in ("lcm", "tcd"):
        return False  # distillations have more steps than that
    return config != "zero_snr" or scheduler not in NOT_RESCALED


def spacings(config: str, scheduler: str) -> tuple[str | None, ...]:
    """Those whose grids differ, None for the class's own; one for configs that say nothing of the grid."""
    one = scheduler in ("lcm", "tcd") or (config in ONLY and config not in ("prk", "karras", "sigma_min"))
    one |= config == "karras" and scheduler in SOLVERS
    return (None,) if one else (None, "leading", "trailing", "linspace")


def cases() -> list[Case]:
    found = []
    for config in CONFIGS:
        for name in NAMES:
            # diffusers' float32 x / alpha keeps four digits at cosine's first sigma / alpha, 2e4: grids are compared.
            steep = "cosine" in config and name in ("euler", "heun", "lms")
            if not comparable(config, name) or steep:
                continue
            # Under and over the 15 steps of `lower_order_final`; 7 does not divide the steps of training.
            found += [Case(config, name, s, 7) for s in spacings(config, name)]
            if config in ("sd1", "sd2", "zero_snr", "prk", "order_3", "order_3_open", "sigma_min", "noise", "flow"):
                found += [Case(config, name, None, 20)]
    found += [Case("sd1", name, s, 20) for name in ("ddim", "pndm", "euler") for s in spacings("sd1", name)[1:]]
    found += [Case(config, "ddim", "trailing", 7, eta) for config in ("sd1", "defaults") for eta in (0.4, 1.0)]
    return found + starts()


def starts() -> list[Case]:
    """Images redrawn: strengths 0.9, 0.75, 0.5 and 0.3 of 20 steps, and what is odd about few."""
    found = [Case("sd1", name, None, 20, start=start) for name in CLASSES for start in (2, 5, 10, 14)]
    found += [Case("sd1", name, None, 7, start=1) for name in CLASSES]
    found += [Case("sd1", "pndm", s, 7, start=start) for s in ("trailing", "linspace") for start in (1, 2, 6)]
    for config in ("sd2", "order_3", "order_3_open", "noise", "bh1", "zero_snr", "flow"):
        found += [Case(config, name, None, 7, start=2) for name in CLASSES if comparable(config, name)]
    for name in ("heun", "pndm", "euler", "unipc", "lcm"):
        found += [Case("sd1", name, None, 7, start=start, masked=True) for start in (0, 2)]
    return found


def network(x, t, xp):
    """A smooth stand-in for the network, in the arithmetic of numpy, jax.numpy or torch.

    Rising in x, it contracts the paths it guides, so that rounding errors do not grow along them.
    """
    return 0.9 * xp.tanh(0.8 * x) + 0.2 * xp.sin(0.013 * t + 3 * x)


def mixing(x, t, xp):
    """Another, that sees the neighbours of each value too."""
    return network(x + 0.5 * x.mean(-1)[..., None], t, xp)


def start() -> np.ndarray:
    """Unit noise [B, ...] to start from."""
    return np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)


def original() -> np.ndarray:
    """Clean latents [B, ...] of an image that is redrawn."""
    return np.random.default_rng(1).uniform(-1, 1, SHAPE).astype(np.float32)


def noise(step: int, count: int | None = None) -> np.ndarray:
    """The noise [B, ...] (with a count [count, B, ...]) that `sample` under the key `KEY` draws at a step."""
    keys = step_keys(sample_keys(jax.random.key(KEY), SHAPE[0]), step)
    return np.array(noise_like(keys, np.zeros(SHAPE), count))
