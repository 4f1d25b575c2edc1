"""The PyTorch side of the comparison of schedulers: diffusers' classes run on the cases.

Imported only by tests that have asked for diffusers with `pytest.importorskip`, and by `make_golden_schedulers.py`.
"""

import inspect
from unittest import mock

import diffusers
import numpy as np
import torch

from jaxdiff.config import SchedulerConfig
from tests.scheduler_cases import Case, network, noise, start

CLASSES = {
    "ddim": diffusers.DDIMScheduler,
    "ddpm": diffusers.DDPMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "euler_ancestral": diffusers.EulerAncestralDiscreteScheduler,
    "heun": diffusers.HeunDiscreteScheduler,
    "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
}


def build(config: SchedulerConfig, name: str):
    """The diffusers scheduler of a config; keys that the config leaves open take the defaults of the class."""
    cls, values = CLASSES[name], config.to_dict()
    if config.beta_schedule == "flow":
        values |= {"beta_schedule": "linear", "use_flow_sigmas": True, "flow_shift": config.shift}
        cls = diffusers.FlowMatchEulerDiscreteScheduler if name == "euler" else cls
    known = inspect.signature(cls.__init__).parameters
    values = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items() if k in known}
    return cls(**values)


def grid(config: SchedulerConfig, name: str, steps: int):
    """(t [N], sigma [N + 1] or None, scale of the first noise) of the class."""
    scheduler = build(config, name)
    scheduler.set_timesteps(steps)
    t = scheduler.timesteps.numpy()
    sigma = scheduler.sigmas.numpy() if name not in ("ddim", "ddpm") else None
    if name == "heun":  # the second call of each step is interleaved
        t, sigma = np.append(t[0], t[1::2]), np.concatenate([sigma[:1], sigma[1:-1:2], sigma[-1:]])
    scale = getattr(scheduler, "init_noise_sigma", 1.0)
    return t.astype(np.float64), sigma, float(scale)


def alphas(scheduler, steps: int) -> np.ndarray:
    """The factors [N + 1] that turn the class's x at each time into alpha x0 + sigma eps."""
    if isinstance(scheduler, tuple(CLASSES[name] for name in ("euler", "euler_ancestral", "heun"))):
        sigma = scheduler.sigmas.numpy().astype(np.float64)
        if scheduler.order == 2:
            sigma = np.concatenate([sigma[:1], sigma[1:-1:2], sigma[-1:]])
        return 1 / np.sqrt(sigma**2 + 1)
    return np.ones(steps + 1)


def run(case: Case) -> np.ndarray:
    """x after each step, [N, B, D] float32, in the scale alpha x0 + sigma eps."""
    scheduler = build(case.values, case.scheduler)
    scheduler.set_timesteps(case.steps)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)  # else a whole time that comes twice at the start skips a step
    x = torch.from_numpy(start()) * getattr(scheduler, "init_noise_sigma", 1.0)
    drawn = (torch.from_numpy(noise(i)) for i in range(case.steps))
    states = []
    with mock.patch(f"{type(scheduler).__module__}.randn_tensor", create=True, side_effect=drawn):
        for i, t in enumerate(scheduler.timesteps):
            scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            options = {"eta": case.eta} if case.eta else {}
            x = scheduler.step(network(scaled, t, torch), t, x, **options).prev_sample
            if scheduler.order == 1 or i % 2 == 1 or i == len(scheduler.timesteps) - 1:
                states.append(x.numpy())
    scale = alphas(scheduler, case.steps)[1:, None, None]
    return (np.stack(states) * scale).astype(np.float32)
