"""The config of the noise schedule and of the sampling method."""

import dataclasses
from typing import Any, ClassVar, Self

from jaxdiff.config.base import Config, ConfigError

MOST_TIMESTEPS = 100_000  # published models have 1000
_FLOW = {"prediction_type": "flow_prediction", "beta_schedule": "flow"}
_SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012}
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "flow")
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "flow_prediction")
CHOICES = {"beta_schedule": BETA_SCHEDULES, "prediction_type": PREDICTION_TYPES}
CLASS_DEFAULTS: dict[str, dict[str, Any]] = {  # of scheduler classes whose defaults differ from the others'
    "FlowMatchEulerDiscreteScheduler": _FLOW,
    "FlowMatchHeunDiscreteScheduler": _FLOW,
    "HeunDiscreteScheduler": _SD_BETAS,
    "DPMSolverSDEScheduler": _SD_BETAS,
    "KDPM2DiscreteScheduler": _SD_BETAS,
    "KDPM2AncestralDiscreteScheduler": _SD_BETAS,
    "LCMScheduler": {**_SD_BETAS, "beta_schedule": "scaled_linear"},
    "TCDScheduler": {**_SD_BETAS, "beta_schedule": "scaled_linear"},
}


@dataclasses.dataclass(frozen=True)
class SchedulerConfig(Config):
    """`scheduler_config.json`. None stands for the default of the scheduler's class, see diffusion/times.py."""

    CLASS_NAME: ClassVar[str] = "DDIMScheduler"
    class_name: str = "DDIMScheduler"  # the file's `_class_name`
    num_train_timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    beta_schedule: str = "linear"  # "linear", "scaled_linear", "squaredcos_cap_v2"; "flow" for rectified flow
    trained_betas: tuple[float, ...] | None = None
    prediction_type: str = "epsilon"  # "epsilon", "v_prediction", "sample", "flow_prediction"
    rescale_betas_zero_snr: bool = False
    shift: float = 1.0  # rectified flow: t -> shift t / (1 + (shift - 1) t)
    use_dynamic_shifting: bool = False  # flows: shift by the size of the image instead of `shift`
    time_shift_type: str = "exponential"  # of the dynamic shift; or "linear"
    base_shift: float = 0.5  # the dynamic shift of images of `base_image_seq_len` patches
    max_shift: float = 1.15  # … and of `max_image_seq_len`
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    # The time grid.
    timestep_spacing: str | None = None  # "leading", "trailing", "linspace"
    steps_offset: int = 0
    set_alpha_to_one: bool | None = None  # DDIM, PNDM: whether the last step goes to alpha 1
    final_sigmas_type: str = "zero"  # or "sigma_min"
    interpolation_type: str = "linear"  # Euler: "log_linear" spreads the levels evenly in log sigma
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    use_lu_lambdas: bool = False
    sigma_max: float | None = None  # ends of the three spacings above; None: those of the table
    sigma_min: float | None = None
    original_inference_steps: int = 50  # LCM, TCD: timesteps of the distillation, from which the grid is chosen
    # Bounds on the prediction of x0.
    clip_sample: bool | None = None
    clip_sample_range: float = 1.0
    thresholding: bool = False  # dynamic (Saharia et al. 2022), instead of clipping
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0
    # The method.
    variance_type: str | None = None  # DDPM
    algorithm_type: str = "dpmsolver++"  # DPM-Solver: "dpmsolver++", "sde-dpmsolver++", "dpmsolver"
    solver_type: str | None = None  # DPM-Solver: "midpoint", "heun"; UniPC: "bh1", "bh2"
    solver_order: int = 2  # DPM-Solver, UniPC: 1 to 3
    lower_order_final: bool = True
    euler_at_final: bool = False
    predict_x0: bool = True  # UniPC
    disable_corrector: tuple[int, ...] = ()  # UniPC: indices of steps without correction
    skip_prk_steps: bool | None = None  # PNDM: whether it starts with a Heun step, not three Runge-Kutta steps
    timestep_scaling: float = 10.0  # LCM
    # Other values than these are refused if they would change the image, see diffusion/times.py.
    timestep_type: str = "discrete"
    lambda_min_clipped: float = float("-inf")
    invert_sigmas: bool = False
    shift_terminal: float | None = None
    stochastic_sampling: bool = False

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        name = str(values.get("_class_name") or cls.class_name).removeprefix("Flax")
        steps = values.get("num_train_timesteps")
        if isinstance(steps, int) and not 1 <= steps <= MOST_TIMESTEPS:
            raise ConfigError(f"num_train_timesteps is {steps} and must be 1 to {MOST_TIMESTEPS}.")
        for key, known in CHOICES.items():
            if isinstance(value := values.get(key), str) and value not in known:
                raise ConfigError(f"{key} {value!r} is unknown; known are {', '.join(known)}.")
        if values.get("use_flow_sigmas"):  # set by classes that also support other processes
            values = {**values, "beta_schedule": "flow", "shift": values.get("flow_shift", 1.0)}
        return super().from_dict({"class_name": name, **CLASS_DEFAULTS.get(name, {}), **values})._checked()

    def with_prediction_type(self, prediction_type: str) -> Self:
        """The config with another prediction type. Raises ConfigError if the scheduler's class does not support it."""
        return dataclasses.replace(self, prediction_type=prediction_type)._checked()

    def _checked(self) -> Self:
        if self.is_velocity and self.prediction_type != "flow_prediction":  # diffusers' class does not read it
            raise ConfigError(
                f"prediction_type {self.prediction_type!r} does not go with {self.class_name}, which takes what the "
                "network predicts as the flow's velocity: leave it out, or name another class of scheduler."
            )
        return self

    @property
    def is_velocity(self) -> bool:
        """Whether the class interprets every prediction as a velocity."""
        return self.class_name.startswith("FlowMatch")

    def to_dict(self) -> dict[str, Any]:
        """The values for a file: the noise schedule, and everything that differs from the defaults of its class."""
        values = dataclasses.asdict(self)
        defaults = dataclasses.asdict(self.from_dict({"_class_name": self.class_name}))
        betas = () if self.beta_schedule == "flow" else ("beta_start", "beta_end", "beta_schedule", "prediction_type")
        always = ("num_train_timesteps", *betas)
        changed = {k: v for k, v in values.items() if v is not None and (k in always or v != defaults[k])}
        changed.pop("class_name", None)
        if self.beta_schedule == "flow":
            changed = {k: v for k, v in changed.items() if not k.startswith("beta_")}
            if not self.class_name.startswith("FlowMatch"):
                changed |= {"use_flow_sigmas": True, "flow_shift": changed.pop("shift", 1.0)}
        return {"_class_name": self.class_name, **changed}
