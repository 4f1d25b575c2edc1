"""What train.py can teach a denoiser: from a config to a stage, its parameters, and the files that come out."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxdiff.diffusion.prediction import PREDICTION_TYPES
from jaxdiff.diffusion.schedules import is_flow
from jaxdiff.io.controlnet import load_controlnet, save_controlnet
from jaxdiff.io.edges import canny
from jaxdiff.io.lora import ATTENTION, save_lora
from jaxdiff.io.pretrained import parts, save
from jaxdiff.io.textual_inversion import encoders, save_textual_inversion
from jaxdiff.models.controlnet import from_unet
from jaxdiff.models.model import Model, with_controlnets
from jaxdiff.scheduler_config import SchedulerConfig
from jaxdiff.training import finetune, personalise
from jaxdiff.training.finetune import Given
from jaxdiff.training.loop import Stage
from jaxdiff.training.optimizer import check_rates
from jaxdiff.training.personalise import Whole
from jaxdiff.training.stages import Network, Noising, diffusion_stage
from jaxdiff.training.state import OptionsError
from jaxdiff.typing import PRNG, Params

LORA_FILES = {"diffusers": "pytorch_lora_weights.safetensors", "kohya": "kohya.safetensors"}
DEFAULT_TRAINABLE = ("unet",)
WORD_FILE = "learned_embeds.safetensors"


class Target(NamedTuple):
    """One thing to train."""

    stage: Stage
    params: Params  # all that the loss reads
    model: Model  # as it is in the end
    whole: Whole  # params of the loss -> those that `model` draws with
    export: Callable[[Path, Params], None]  # writes what was trained, of params of the loss, into a folder
    network: Network  # what denoises, of `whole` parameters
    given: Callable[[Mapping[str, Any]], Given] | None  # where a prompt alone draws nothing: what does, of a batch read
    steer: Callable[[np.ndarray], np.ndarray] | None = None  # see `jaxdiff.data.captioned.captioned_data`


def make(config: Any, model: Model, params: Params) -> Target:
    """What `config.stage` names, one of `TARGETS`.

    Args:
        config: all settings, see configs/common.py.
        model, params: what training starts from.

    Returns:
        A target whose parameters are numpy arrays, which take no memory of a device.

    Raises:
        ConfigError, OptionsError, WeightsError: one sentence naming the setting.
    """
    target = _made(config, model, params)
    return target._replace(params=jax.device_get(target.params))


def described(config: Any, model: Model, shapes: Params) -> Target:
    """The target of `make` with the shapes of its parameters, from those of the model's; nothing is allocated."""
    made: list[Target] = []

    def run(params: Params) -> Params:
        made.append(_made(config, model, params))
        return made[-1].params

    shapes = jax.eval_shape(run, shapes)
    return made[-1]._replace(params=shapes)


def _made(config: Any, model: Model, params: Params) -> Target:
    model = dataclasses.replace(model, scheduler=process(config, model.scheduler))
    target = TARGETS[config.stage](config, model, params)
    check_rates(config.rates, target.params, target.stage.trainable)  # now, before latents are computed
    return target


def process(config: Any, given: SchedulerConfig) -> SchedulerConfig:
    """The model's own process with `config.prediction_type` and `config.zero_terminal_snr`.

    The steps of a process without any signal at its end are spaced to begin there (Lin et al. 2023, section 3.3).

    Raises:
        OptionsError: an unknown type, or one that says nothing where there is no signal.
    """
    wanted = config.prediction_type or given.prediction_type
    if wanted not in PREDICTION_TYPES:
        raise OptionsError(f"prediction_type {wanted!r} must be one of {', '.join(PREDICTION_TYPES)}.")
    if wanted == "flow_prediction" and not is_flow(given):
        steps = given.num_train_timesteps
        return SchedulerConfig.from_dict(
            {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": steps}
        )
    changed = dataclasses.replace(given, prediction_type=wanted)
    if config.zero_terminal_snr:
        if wanted == "epsilon" or is_flow(given):
            raise OptionsError(
                f"zero_terminal_snr needs another prediction_type than {wanted!r}, such as v_prediction."
            )
        changed = dataclasses.replace(changed, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    return changed


def _same(params: Params) -> Params:
    return params


def _stage(
    config: Any, model: Model, name: str, trainable: tuple[str, ...], network: Network, whole: Whole | None = None
) -> Stage:
    noising = {name: config[name] for name in Noising.__dataclass_fields__}
    return diffusion_stage(model, trainable=trainable, name=name, network=network, whole=whole, **noising)


def _modules(config: Any, model: Model) -> tuple[str, ...]:
    """`config.trainable`. Raises OptionsError where the model has no such part."""
    known, chosen = ["unet", *encoders(model)], tuple(config.trainable)
    if not chosen or set(chosen) - set(known):
        raise OptionsError(f"trainable {chosen} must name some of {', '.join(known)}.")
    return chosen


def _check_no_choice(config: Any) -> None:
    """Raises OptionsError where `config.trainable` names what a stage does not train, which only trains its own."""
    if tuple(config.trainable) != DEFAULT_TRAINABLE:
        raise OptionsError(
            f"trainable {tuple(config.trainable)} means nothing to the stage {config.stage}, which trains nothing of "
            "the model itself: leave it out."
        )


def _save_model(model: Model) -> Callable[[Path, Params], None]:
    if model.family == "upscaler":  # of which PyTorch diffusers has none under ControlNets
        model = dataclasses.replace(model, controlnets=())
    return lambda folder, params: save(folder, model, parts(model, params))


def _seen(model: Model) -> tuple[Network, Callable[[Mapping[str, Any]], Given] | None]:
    """The network of a model without ControlNets, and what it draws from beside a prompt."""
    network = finetune.network_of(model)
    if model.inpaints:
        return network, finetune.drawn_around
    return network, functools.partial(finetune.drawn_larger, model) if model.family == "upscaler" else None


def _unet(config: Any, model: Model, params: Params, name: str = "unet") -> Target:
    network, given = _seen(model)
    stage = _stage(config, model, name, _modules(config, model), network)
    return Target(stage, params, model, _same, _save_model(model), network, given)


def _lora(config: Any, model: Model, params: Params) -> Target:
    c = config.lora
    alpha = float(c.alpha or c.rank)
    chosen = {"targets": _modules(config, model), "endings": tuple(c.layers) or ATTENTION}
    params, whole = personalise.with_lora(
        model, params, c.rank, alpha, jax.random.key(config.seed, impl=PRNG), **chosen
    )
    network, given = _seen(model)
    stage = _stage(config, model, "lora", ("lora",), network, whole)

    def export(folder: Path, params: Params) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for layout, name in LORA_FILES.items():
            save_lora(folder / name, model, personalise.lora_of(params, alpha), layout)  # type: ignore[arg-type]

    return Target(stage, params, model, whole, export, network, given)


def _textual_inversion(config: Any, model: Model, params: Params) -> Target:
    _check_no_choice(config)
    c = config.word
    model, params, whole = personalise.with_word(model, params, c.token, c.initial, c.vectors)
    network, given = _seen(model)
    stage = _stage(config, model, "word", ("words",), network, whole)

    def export(folder: Path, params: Params) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_textual_inversion(folder / WORD_FILE, model, whole(params), c.token)

    return Target(stage, params, model, whole, export, network, given)


def _controlnet(config: Any, model: Model, params: Params) -> Target:
    _check_no_choice(config)
    c = config.controlnet
    if c.init_from:
        net, values = load_controlnet(c.init_from, dtype=None)
        net = net.copy(dtype=model.unet.dtype, remat=model.unet.remat)
    else:
        net, values = from_unet(
            model.unet, params["unet"], jax.random.key(config.seed, impl=PRNG), model.vae.config.factor
        )
    model, params = with_controlnets(model, params, (net, values))
    network = finetune.controlled_network(model)
    stage = _stage(config, model, "controlnet", ("controlnet",), network)
    prepare, steer = stage.prepare, functools.partial(canny, low=c.canny_low, high=c.canny_high)
    stage = stage._replace(prepare=lambda batch: prepare(finetune.steered(batch, steer)))

    def given(batch: Mapping[str, Any]) -> Given:
        return finetune.drawn_by_hint(finetune.steered(batch, steer))

    def export(folder: Path, params: Params) -> None:
        save_controlnet(folder, net, params["controlnet"][0])

    return Target(stage, params, model, _same, export, network, given, steer)


def _inpainting(config: Any, model: Model, params: Params) -> Target:
    return _unet(config, *finetune.inpainting_model(model, params), "inpainting")


def _upscaler(config: Any, model: Model, params: Params) -> Target:
    return _unet(config, *finetune.upscaler_model(model, params), "upscaler")


TARGETS: Mapping[str, Callable[[Any, Model, Params], Target]] = {
    "unet": _unet,
    "lora": _lora,
    "textual_inversion": _textual_inversion,
    "controlnet": _controlnet,
    "inpainting": _inpainting,
    "upscaler": _upscaler,
}
