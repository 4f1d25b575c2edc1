"""Distillation: a UNet that draws in a few steps what a guided teacher draws in many (diffusion/consistency.py).

Batches are those of `diffusion_stage`. The student starts as a copy of the teacher. It gets the teacher's guidance
scale as an embedding, or learns one mixture of all scales.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.config import SchedulerConfig
from jaxdiff.diffusion import consistency
from jaxdiff.diffusion.prediction import add_noise
from jaxdiff.diffusion.schedules import Time, at, is_flow, noise_schedule
from jaxdiff.io.configs import replace_config
from jaxdiff.models.attention import forward_differentiable
from jaxdiff.models.conditioning import Conditioning
from jaxdiff.models.layers import sinusoid_frequencies
from jaxdiff.models.model import Model, apply, with_time_ids
from jaxdiff.sampling.denoiser import denoiser, guidance_embedding
from jaxdiff.training.loop import Stage
from jaxdiff.training.options import DistillationOptions, NoiseOptions, OptionsError
from jaxdiff.training.stages import (
    Network,
    compute_dtypes,
    conditioning,
    fold_in_each,
    latents_of,
    per_example,
    prepare_diffusion,
    prepare_pairs,
    random_noise,
    random_times,
    split_each,
    unconditional,
)
from jaxdiff.training.train_step import NO_CAST, Batch, Dtypes, Loss, Metrics, split_state
from jaxdiff.typing import Array, Denoise, Key, Params

TEACHER = "teacher"  # key of the teacher's UNet, where the student's is trained as a whole
FEW_STEPS = 4  # default number of steps of a distilled model
TIME = "time_embedding"  # part of a UNet


class Student(NamedTuple):
    """A model to be distilled."""

    model: Model  # the student
    teacher: Model  # the model that training starts from
    params: Params  # of both
    merge_params: Callable[[Params], Params]  # parameters of the loss -> those of `model`
    teacher_key: str  # of the teacher's UNet among the parameters of the loss


def few_steps(model: Model, guidance_dim: int, solver_steps: int) -> Model:
    """The model with the scheduler of a consistency model, and with an embedding of the guidance if `guidance_dim`.

    Raises:
        OptionsError: the model draws from more than a prompt, is a flow, or is distilled already.
    """
    scheduler, setting = model.scheduler, "init_from.model"
    if model.inpaints or model.family == "upscaler" or model.controlnets:
        raise OptionsError(f"{setting}: distillation is for models that draw from a prompt alone.")
    if is_flow(scheduler):
        raise OptionsError(f"{setting}: distillation is for models whose scheduler has betas, and this one is a flow.")
    if model.unet.config.time_cond_proj_dim is not None:
        raise OptionsError(f"{setting} is a distilled model already, and has no guidance to learn from.")
    if solver_steps > scheduler.num_train_timesteps:
        raise OptionsError(f"distillation.solver_steps {solver_steps} must be at most {scheduler.num_train_timesteps}.")
    kept_fields = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type",
               "rescale_betas_zero_snr")  # fmt: skip
    lcm = SchedulerConfig.from_dict({"_class_name": "LCMScheduler", "original_inference_steps": solver_steps})
    lcm = dataclasses.replace(lcm, **{field: getattr(scheduler, field) for field in kept_fields})
    model = dataclasses.replace(model, options=dataclasses.replace(model.options, steps=FEW_STEPS, pag_scale=0.0))
    if guidance_dim:
        return dataclasses.replace(replace_config(model, "unet", time_cond_proj_dim=guidance_dim), scheduler=lcm)
    options = dataclasses.replace(model.options, guidance_scale=1.0)
    return dataclasses.replace(model, scheduler=lcm, options=options)


def whole_student(model: Model, params: Params, options: DistillationOptions) -> Student:
    """A student whose whole UNet is trained; the embedding of the guidance starts with weight 0."""
    student, unet = few_steps(model, options.guidance_dim, options.solver_steps), dict(params["unet"])
    if options.guidance_dim:
        kernel = np.zeros((options.guidance_dim, model.unet.config.block_out_channels[0]), np.float32)
        unet[TIME] = {**unet[TIME], "cond_proj": {"kernel": kernel}}
    return Student(student, model, {**params, "unet": unet, TEACHER: params["unet"]}, lambda params: params, TEACHER)


def smooth(student: Student, frequency: float) -> Student:
    """The student with weight 0 for the sinusoids of t that turn by more than `frequency` radians a step.

    A network trained on integer timesteps alone is rough between them: the fast sinusoids hardly change its output,
    but make up most of its derivative in t, as noise (Lu & Song 2024, section 4.1, whose network has no such
    sinusoids). In the bundled model 0.05 changes 1 % of the output, and brings the derivative to within a tenth of a
    finite difference over forty steps, but for the last fifty.
    """
    config = student.model.unet.config
    rates = sinusoid_frequencies(config.block_out_channels[0] // 2, config.freq_shift)
    is_slow = jnp.tile(rates <= frequency, 2)[:, None]

    def without_fast(params: Params) -> Params:
        embedding = params["unet"][TIME]
        linear = {**embedding["linear_1"], "kernel": jnp.where(is_slow, embedding["linear_1"]["kernel"], 0.0)}
        return {**params, "unet": {**params["unet"], TIME: {**embedding, "linear_1": linear}}}

    return student._replace(params=without_fast(student.params), merge_params=without_fast)


# --- the noised batch and the teacher's prediction, for both losses


class Example(NamedTuple):
    """Noised latents of a batch and the guided teacher's prediction of the clean ones."""

    x: Array  # [B, h, w, C], noised latents
    time: Time  # [B]
    cond: Conditioning
    scale: Array  # [B], guidance scales
    x0: Array  # [B, h, w, C], the guided teacher's prediction


def example(
    student: Student,
    params: Params,
    batch: Batch,
    keys: Key,
    times: Callable[[Key], Array],
    options: DistillationOptions,
    noise_options: NoiseOptions,
) -> Example:
    """Noised latents of a batch, at `times` of keys [B], and the guided teacher's prediction of the clean ones."""
    model, teacher = student.model, student.teacher
    time_keys, noise_keys, drop_keys = split_each(keys, 3)
    latents = latents_of(teacher, params, batch)
    empty = prepare_pairs(model)({"text": [""]})
    drop = per_example(jax.random.uniform, drop_keys, ()) < noise_options.caption_dropout
    cond = with_time_ids(teacher, conditioning(teacher, params, batch, empty, drop), latents)
    uncond = unconditional(teacher, params, empty, len(latents))
    if not teacher.options.requires_aesthetics_score:
        uncond = uncond._replace(time_ids=cond.time_ids)
    time = at(noise_schedule(model.scheduler), times(time_keys))
    x = add_noise(latents, random_noise(noise_keys, latents.shape[1:], noise_options.offset_noise), time)
    u = per_example(jax.random.uniform, fold_in_each(keys, 2), ())
    scale = options.guidance_min + (options.guidance_max - options.guidance_min) * u
    frozen = {"unet": params[student.teacher_key]}
    x0 = denoiser(teacher, frozen, cond, uncond, scale)(x, time)
    return jax.lax.stop_gradient(Example(x, time, cond, scale, x0))


def _stage(student: Student, name: str, trainable: tuple[str, ...], loss: Loss) -> Stage:
    dtypes: Dtypes = NO_CAST
    if student.teacher_key == TEACHER:
        dtypes = {**compute_dtypes(student.teacher), TEACHER: student.teacher.unet.dtype}
    return Stage(name, trainable, loss, prepare_diffusion(student.model), dtypes, reads_state=True)


def _weighted_mean(errors: Array, batch: Batch) -> Array:
    """The mean of errors [B, ...], each example multiplied by its weight."""
    return (errors.reshape(len(errors), -1).mean(1) * batch.get("weight", 1.0)).mean()


# --- latent consistency distillation


def lcm_stage(
    student: Student,
    options: DistillationOptions,
    *,
    name: str = "lcm",
    trainable: tuple[str, ...] = ("unet",),
    **noise_options: Any,
) -> Stage:
    """Latent consistency distillation (Luo et al. 2023, algorithm 1; LCM-LoRA: Luo et al. 2023b).

    Args:
        trainable: keys of the trained parameters, whose moving average makes the target.
        noise_options: fields of `NoiseOptions`.
    """
    model, noise = student.model, NoiseOptions(**noise_options)
    schedule, num_timesteps = noise_schedule(model.scheduler), model.scheduler.num_train_timesteps
    step_size, scaling = num_timesteps // options.solver_steps, model.scheduler.timestep_scaling

    def times(keys: Key) -> Array:
        """Timesteps of the solver, as in sampling (diffusion/spacing.py, equation 4)."""
        step = jnp.minimum(random_times(model.scheduler, keys, noise) // step_size, options.solver_steps - 1)
        return (step + 1) * step_size - 1

    def loss(params: Params, batch: Batch, keys: Key) -> tuple[Array, Metrics]:
        params, state = split_state(params)
        noised = example(student, params, batch, keys, times, options, noise)
        next_time = at(schedule, jnp.maximum(noised.time.t - step_size, 0))
        x_next = consistency.solver_step(noised.x0, noised.x, noised.time, next_time)

        def f(params: Params, x: Array, time: Time) -> Array:
            denoise: Denoise = denoiser(model, student.merge_params(params), noised.cond, None, noised.scale)
            return consistency.consistency(denoise(x, time), x, time.t, scaling)

        target = jax.lax.stop_gradient(f({**params, **state["ema"]}, x_next, next_time))
        errors = consistency.pseudo_huber(f(params, noised.x, noised.time) - target, options.huber_c)
        return _weighted_mean(errors, batch), {}

    return _stage(student, name, trainable, loss)


# --- continuous consistency distillation


def scm_stage(student: Student, options: DistillationOptions, *, name: str = "scm", **noise_options: Any) -> Stage:
    """Consistency distillation in continuous time (Lu & Song 2024, algorithm 1, without the learned time weighting).

    Args:
        student: of `smooth`.

    Raises:
        OptionsError: the model predicts something else than v.
    """
    model, noise = student.model, NoiseOptions(**noise_options)
    if model.scheduler.prediction_type != "v_prediction":
        raise OptionsError(
            f"init_from.model predicts {model.scheduler.prediction_type}, and the stage {name} needs v_prediction: "
            "take the stage lcm, or train the model with prediction_type=v_prediction first."
        )
    table = consistency.angles(noise_schedule(model.scheduler))
    network = guided_network(model)

    def loss(params: Params, batch: Batch, keys: Key) -> tuple[Array, Metrics]:
        params, state = split_state(params)
        noised = example(
            student, params, batch, keys, lambda k: random_times(model.scheduler, k, noise), options, noise
        )
        index = noised.time.t.astype(jnp.int32)
        phi, rate = jnp.asarray(table.phi)[index], jnp.asarray(table.rate)[index]
        teacher = (jnp.cos(phi)[:, None, None, None] * noised.x - noised.x0) / jnp.sin(phi)[:, None, None, None]
        warmup = jnp.minimum(1.0, (state["step"] + 1) / max(options.tangent_warmup, 1))

        def velocity(x: Array, t: Array) -> Array:
            return network(student.merge_params(params), x, t, noised.cond, noised.scale).astype(jnp.float32)

        with forward_differentiable():
            f, g = consistency.tangent(velocity, noised.x, noised.time.t, phi, rate, teacher, warmup)
        errors = (f - jax.lax.stop_gradient(f + consistency.normalised(g))) ** 2
        return _weighted_mean(errors, batch), {"tangent": jnp.sqrt((g**2).mean())}

    return _stage(student, name, ("unet",), loss)


def guided_network(model: Model) -> Callable[[Params, Array, Array, Conditioning, Array | float], Array]:
    """The student's UNet by itself: (params, x, t, conditioning, guidance scale) -> output."""
    dim = model.unet.config.time_cond_proj_dim

    def network(params: Params, x: Array, t: Array, cond: Conditioning, scale: Array | float) -> Array:
        embedded = None if dim is None else guidance_embedding(scale, len(x), dim)
        return apply(model, params, "unet", x, t, *cond, None, embedded)

    return network


def evaluated_network(model: Model, options: DistillationOptions) -> Network:
    """The network whose loss is evaluated by noise level, at the middle of the range of guidance scales."""
    network, scale = guided_network(model), (options.guidance_min + options.guidance_max) / 2
    return lambda params, x, time, cond, batch, keys: network(params, x, time.t, cond, scale)
