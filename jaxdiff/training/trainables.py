"""What can be trained: from a config to a stage, its parameters, and the files that it exports."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.config import SchedulerConfig
from jaxdiff.config.scheduler import PREDICTION_TYPES
from jaxdiff.diffusion.schedules import is_flow
from jaxdiff.io.controlnet import load_controlnet, save_controlnet
from jaxdiff.io.discriminator import load_patches
from jaxdiff.io.edges import canny
from jaxdiff.io.lora import ATTENTION, save_lora
from jaxdiff.io.pretrained import parts, save
from jaxdiff.io.textual_inversion import encoders, save_textual_inversion
from jaxdiff.models.controlnet import from_unet
from jaxdiff.models.discriminator import PatchDiscriminator
from jaxdiff.models.model import Model, with_controlnets
from jaxdiff.models.tiny_vae import AutoencoderTiny
from jaxdiff.training import adapters, distillation, finetune
from jaxdiff.training.adapters import MergeParams
from jaxdiff.training.adversarial import Rules
from jaxdiff.training.finetune import SampleInputs
from jaxdiff.training.gan import gan_discriminator, gan_model, gan_stage
from jaxdiff.training.loop import Stage
from jaxdiff.training.optimizer import check_multipliers
from jaxdiff.training.options import DistillationOptions, NoiseOptions, OptionsError, RedrawOptions
from jaxdiff.training.ranges import naming
from jaxdiff.training.stages import Network, clip_params, clip_stage, diffusion_stage, vae_stage
from jaxdiff.training.vae_decoder import merge_decoder, split_decoder, vae_decoder_stage
from jaxdiff.typing import PRNG, Params

LORA_FILES = {"diffusers": "pytorch_lora_weights.safetensors", "kohya": "kohya.safetensors"}
DEFAULT_TRAINABLE = ("unet",)
EMBEDDING_FILE = "learned_embeds.safetensors"
MakeInputs = Callable[[Mapping[str, Any]], SampleInputs]


def _identity(params: Params) -> Params:
    return params


class Trainable(NamedTuple):
    """What a stage trains, and how it is exported. Fields after `export` have defaults that suit most stages."""

    stage: Stage
    params: Params  # all that the loss reads
    model: Any  # the `Model` after training; None if the network is no part of a model
    export: Callable[[Path, Params], None]  # (folder, params of the loss): writes what was trained
    merge_params: MergeParams = _identity  # params of the loss -> those that `model` draws with
    network: Network | None = None  # the denoiser, of merged parameters
    # (batch) -> inputs of the model besides the prompt; None if it needs only a prompt.
    sample_inputs: MakeInputs | None = None
    make_control_image: Callable[[np.ndarray], np.ndarray] | None = None  # see `jaxdiff.data.captioned.captioned_data`
    upscaler: Any = None  # an `RRDBNet`, of the stage "super_resolution"


def make(config: Any, model: Model, params: Params) -> Trainable:
    """The trainable of `config.stage`, a key of `TRAINABLES`.

    Args:
        config: all settings, see jaxdiff/training/defaults.py.
        model, params: what training starts from.

    Returns:
        A trainable whose parameters are numpy arrays, which use no device memory.

    Raises:
        ConfigError, OptionsError, WeightsError: one sentence naming the setting.
    """
    trainable = _make(config, model, params)
    return trainable._replace(params=jax.device_get(trainable.params))


def described(config: Any, model: Model, shapes: Params) -> Trainable:
    """The trainable of `make` with the shapes of its parameters, from those of the model's; nothing is allocated."""
    trainables: list[Trainable] = []

    def run(params: Params) -> Params:
        trainables.append(_make(config, model, params))
        return trainables[-1].params

    shapes = jax.eval_shape(run, shapes)
    return trainables[-1]._replace(params=shapes)


UNET_STAGES = ("textual_inversion", "controlnet", "inpainting", "upscaler", "lcm", "lcm_lora", "scm")


def _make(config: Any, model: Model, params: Params) -> Trainable:
    if model.unet is None and config.stage in UNET_STAGES:
        raise OptionsError(f"stage {config.stage!r} is for models with a UNet, which init_from.model lacks.")
    if model.is_gan and config.stage in DENOISERS:
        raise OptionsError(f"stage {config.stage!r} is for models that remove noise, and init_from.model is a GAN.")
    if config.stage in DENOISERS:
        model = dataclasses.replace(model, scheduler=process(config, model.scheduler))
    trainable = TRAINABLES[config.stage](config, model, params)
    # Checked here, before latents are computed.
    check_multipliers(config.lr_multipliers, trainable.params, trainable.stage.trainable)
    return trainable


def process(config: Any, scheduler: SchedulerConfig) -> SchedulerConfig:
    """The model's scheduler with `config.prediction_type` and `config.zero_terminal_snr`.

    With zero terminal SNR, sampling starts at the last timestep ("trailing": Lin et al. 2023, section 3.3).

    Raises:
        OptionsError: the prediction type is unknown, or does not go with zero_terminal_snr or a flow.
    """
    prediction_type = config.prediction_type or scheduler.prediction_type
    if prediction_type not in PREDICTION_TYPES:
        raise OptionsError(f"prediction_type {prediction_type!r} must be one of {', '.join(PREDICTION_TYPES)}.")
    if scheduler.is_velocity and config.prediction_type not in ("", "flow_prediction"):
        raise OptionsError(
            f"prediction_type {prediction_type!r} does not go with the model's {scheduler.class_name}, which takes "
            "what the network predicts as the flow's velocity: leave it out."
        )
    if config.zero_terminal_snr and (prediction_type in ("epsilon", "flow_prediction") or is_flow(scheduler)):
        raise OptionsError(
            f"zero_terminal_snr needs another prediction_type than {prediction_type!r}, such as v_prediction."
        )
    if prediction_type == "flow_prediction" and not is_flow(scheduler):
        steps = scheduler.num_train_timesteps
        flow = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": steps}
        return SchedulerConfig.from_dict(flow)
    scheduler = dataclasses.replace(scheduler, prediction_type=prediction_type)
    if config.zero_terminal_snr:
        scheduler = dataclasses.replace(scheduler, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    return scheduler


def _diffusion_stage(config: Any, model: Model, trainable: tuple[str, ...], network: Network, **extra: Any) -> Stage:
    options = dataclasses.asdict(NoiseOptions.from_config(config))
    return diffusion_stage(model, trainable=trainable, name=config.stage, network=network, **extra, **options)


def _trainable_modules(config: Any, model: Model) -> tuple[str, ...]:
    """`config.trainable`. Raises OptionsError where the model has no such part."""
    denoiser = "unet" if model.transformer is None else "transformer"
    known = [denoiser, *encoders(model)]
    modules = tuple(denoiser if name == "unet" else name for name in config.trainable)
    if not modules or set(modules) - set(known):
        raise OptionsError(f"trainable {modules} must name some of {', '.join(known)}.")
    return modules


def _check_default_trainable(config: Any) -> None:
    """Raise OptionsError if `config.trainable` is set for a stage that always trains the same networks."""
    if tuple(config.trainable) != DEFAULT_TRAINABLE:
        trainable = tuple(config.trainable)
        raise OptionsError(f"trainable {trainable} means nothing to the stage {config.stage}, which trains what it is "
                           "made for: leave it out.")  # fmt: skip


def save_model(model: Model) -> Callable[[Path, Params], None]:
    if model.family == "upscaler":  # PyTorch diffusers has no upscaler with ControlNets
        model = dataclasses.replace(model, controlnets=())
    return lambda folder, params: save(folder, model, parts(model, params))


def _network_and_inputs(config: Any, model: Model) -> tuple[Network, MakeInputs | None]:
    """The network of a model without ControlNets, and its inputs besides the prompt."""
    network = finetune.network_of(model, config.embedded_guidance)
    if model.inpaints:
        return network, finetune.inpainting_inputs
    return network, functools.partial(finetune.upscaler_inputs, model) if model.family == "upscaler" else None


def _clip(config: Any, model: Model, params: Params) -> Trainable:
    if model.vision_encoder is None:
        raise OptionsError("model.vision_encoder is missing: the clip stage trains one beside the text encoder.")
    return Trainable(clip_stage(model), clip_params(params), model, save_model(model))


def _vae(config: Any, model: Model, params: Params) -> Trainable:
    stage = vae_stage(model, kl_weight=config.kl_weight, edge_weight=config.edge_weight)
    return Trainable(stage, params, model, save_model(model))


def _vae_decoder(config: Any, model: Model, params: Params) -> Trainable:
    _check_default_trainable(config)
    if isinstance(model.vae, AutoencoderTiny):
        raise OptionsError("vae_decoder trains the decoder of an AutoencoderKL; this model has an AutoencoderTiny.")
    if config.feature_weight and model.vision_encoder is None:
        raise OptionsError(
            f"feature_weight {config.feature_weight} needs a vision encoder, which this model lacks: set "
            "init_from.vision_encoder, or leave it out."
        )
    adversary = config.adversary
    discriminator = PatchDiscriminator(adversary.features, adversary.layers, model.vae.dtype)
    side, key = 3 * 2**adversary.layers, jax.random.key(config.seed, impl=PRNG)
    discriminator_params = discriminator.init(key, jnp.zeros((1, side, side, model.vae.config.out_channels)))["params"]
    redraw = RedrawOptions.from_config(config.redraw)
    read_modules = {"vae", "vision_encoder"} if config.feature_weight else {"vae"}  # others stay off the devices
    if redraw.strength:
        if model.inpaints or model.family == "upscaler" or model.controlnets:
            raise OptionsError("redraw.strength is for models that draw from a prompt alone, and this one does not.")
        read_modules |= params.keys() - {"vision_encoder"}
    unread_params = {name: x for name, x in params.items() if name not in read_modules}
    params = split_decoder({name: params[name] for name in read_modules})
    with naming("adversary.init_from"):
        if adversary.init_from:
            discriminator_params = load_patches(adversary.init_from, discriminator_params)
    params = {**params, "discriminator": discriminator_params}
    rules = Rules(adversary.loss, adversary.r1, adversary.r2, tuple(adversary.augment))
    stage = vae_decoder_stage(
        model, discriminator, rules=rules, weight=adversary.weight, adaptive=adversary.adaptive, start=adversary.start,
        edge_weight=config.edge_weight, feature_weight=config.feature_weight, redraw=redraw,
    )  # fmt: skip

    def export(folder: Path, params: Params) -> None:
        save_model(model)(folder, {**unread_params, **merge_decoder(params)})

    return Trainable(stage, params, model, export, merge_decoder)


def _unet(config: Any, model: Model, params: Params) -> Trainable:
    network, sample_inputs = _network_and_inputs(config, model)
    stage = _diffusion_stage(config, model, _trainable_modules(config, model), network)
    return Trainable(stage, params, model, save_model(model), network=network, sample_inputs=sample_inputs)


def _with_lora(
    config: Any, model: Model, params: Params, targets: tuple[str, ...]
) -> tuple[Params, MergeParams, float]:
    """(parameters with a fresh LoRA of these modules by `config.lora`, the function that merges it, its alpha)."""
    lora = config.lora
    alpha = float(lora.alpha or lora.rank)
    layer_options = {"targets": targets, "endings": tuple(lora.layers) or ATTENTION}
    key = jax.random.key(config.seed, impl=PRNG)
    return *adapters.with_lora(model, params, lora.rank, alpha, key, **layer_options), alpha


def _lora(config: Any, model: Model, params: Params) -> Trainable:
    params, merge, alpha = _with_lora(config, model, params, _trainable_modules(config, model))
    network, sample_inputs = _network_and_inputs(config, model)
    stage = _diffusion_stage(config, model, ("lora",), network, merge_params=merge)
    return Trainable(stage, params, model, _lora_files(model, alpha), merge, network, sample_inputs)


def _lora_files(model: Model, alpha: float) -> Callable[[Path, Params], None]:
    def export(folder: Path, params: Params) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for layout, name in LORA_FILES.items():
            save_lora(folder / name, model, adapters.lora_of(params, alpha), layout)  # type: ignore[arg-type]

    return export


def _textual_inversion(config: Any, model: Model, params: Params) -> Trainable:
    _check_default_trainable(config)
    settings = config.textual_inversion
    model, params, merge = adapters.with_word(model, params, settings.token, settings.initial, settings.vectors)
    network, sample_inputs = _network_and_inputs(config, model)
    stage = _diffusion_stage(config, model, ("words",), network, merge_params=merge)

    def export(folder: Path, params: Params) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_textual_inversion(folder / EMBEDDING_FILE, model, merge(params), settings.token)

    return Trainable(stage, params, model, export, merge, network, sample_inputs)


def _controlnet(config: Any, model: Model, params: Params) -> Trainable:
    _check_default_trainable(config)
    settings = config.controlnet
    if settings.init_from:
        with naming("controlnet.init_from"):
            net, net_params = load_controlnet(settings.init_from, dtype=None, like=model.unet.config)
        net = net.copy(dtype=model.unet.dtype, remat=model.unet.remat)
    else:
        net, net_params = from_unet(
            model.unet, params["unet"], jax.random.key(config.seed, impl=PRNG), model.vae.config.factor
        )
    model, params = with_controlnets(model, params, (net, net_params))
    network = finetune.controlled_network(model)
    stage = _diffusion_stage(config, model, ("controlnet",), network)
    prepare, edges = stage.prepare, functools.partial(canny, low=settings.canny_low, high=settings.canny_high)
    stage = stage._replace(prepare=lambda batch: prepare(finetune.with_control_images(batch, edges)))

    def sample_inputs(batch: Mapping[str, Any]) -> SampleInputs:
        return finetune.control_inputs(finetune.with_control_images(batch, edges))

    def export(folder: Path, params: Params) -> None:
        save_controlnet(folder, net, params["controlnet"][0])

    return Trainable(stage, params, model, export, _identity, network, sample_inputs, edges)


def _inpainting(config: Any, model: Model, params: Params) -> Trainable:
    return _unet(config, *finetune.inpainting_model(model, params))


def _upscaler(config: Any, model: Model, params: Params) -> Trainable:
    return _unet(config, *finetune.upscaler_model(model, params))


def _distilled(config: Any, model: Model, params: Params) -> Trainable:
    """Stages "lcm" and "scm", which train the whole UNet."""
    _check_default_trainable(config)
    options = DistillationOptions.from_config(config.distillation)
    noise_options = dataclasses.asdict(NoiseOptions.from_config(config))
    student = distillation.whole_student(model, params, options)
    if config.stage == "lcm":
        stage = distillation.lcm_stage(student, options, **noise_options)
    else:
        student = distillation.smooth(student, options.time_frequency)
        stage = distillation.scm_stage(student, options, **noise_options)
    network, export = distillation.evaluated_network(student.model, options), save_model(student.model)
    return Trainable(stage, student.params, student.model, export, student.merge_params, network)


def _distilled_lora(config: Any, model: Model, params: Params) -> Trainable:
    """Stage "lcm_lora", which trains a LoRA of the UNet; the teacher is the model without it."""
    _check_default_trainable(config)
    options = DistillationOptions.from_config(config.distillation)
    noise_options = dataclasses.asdict(NoiseOptions.from_config(config))
    few_step_model = distillation.few_steps(model, 0, options.solver_steps)
    params, merge, alpha = _with_lora(config, model, params, ("unet",))
    student = distillation.Student(few_step_model, model, params, merge, "unet")
    stage = distillation.lcm_stage(student, options, name="lcm_lora", trainable=("lora",), **noise_options)
    network = distillation.evaluated_network(few_step_model, options)
    return Trainable(stage, params, few_step_model, _lora_files(model, alpha), merge, network)


def _gan(config: Any, model: Model, params: Params) -> Trainable:
    _check_default_trainable(config)
    adversary = config.adversary
    model, params = gan_model(config, model, params)
    discriminator, discriminator_params = gan_discriminator(config, model)
    rules = Rules(adversary.loss, adversary.r1, adversary.r2, tuple(adversary.augment))
    stage = gan_stage(model, discriminator, rules=rules, caption_dropout=config.caption_dropout)
    return Trainable(stage, {**params, "discriminator": discriminator_params}, model, save_model(model))


Make = Callable[[Any, Model, Params], Trainable]
DENOISERS: Mapping[str, Make] = {
    "unet": _unet,
    "lora": _lora,
    "textual_inversion": _textual_inversion,
    "controlnet": _controlnet,
    "inpainting": _inpainting,
    "upscaler": _upscaler,
    "lcm": _distilled,
    "lcm_lora": _distilled_lora,
    "scm": _distilled,
}
TRAINABLES: Mapping[str, Make] = {"clip": _clip, "vae": _vae, "vae_decoder": _vae_decoder, "gan": _gan, **DENOISERS}
