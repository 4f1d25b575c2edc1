"""Evaluation during a run: metrics on held-out images, and sheets of samples."""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging

from jaxdiff.io.images import grid, write_png
from jaxdiff.sampling.generate import generate
from jaxdiff.training.checks import AUTOENCODERS
from jaxdiff.training.finetune import SampleInputs
from jaxdiff.training.metrics import enlargements, for_each, noise_levels, reconstructions, retrieval
from jaxdiff.training.trackers import TrackedImages
from jaxdiff.training.train_step import cast_frozen
from jaxdiff.training.trainables import Trainable
from jaxdiff.typing import Params

Batch = Mapping[str, Any]
HeldOut = Callable[[], Sequence[Batch]]  # reads batches of held-out images; none if config.eval.images is 0
OnEval = Callable[[int, Params], Mapping[str, float | TrackedImages]]  # see `jaxdiff.training.loop.fit`
CONTROLLED = 4  # images sampled without prompts, by models that need more than a prompt
MAX_PAIRS = 16  # of an image and its reconstruction, in a sheet


class Sheet(NamedTuple):
    """Images to lay out in a grid."""

    images: np.ndarray  # uint8 [N, H, W, 3]
    columns: int
    captions: Sequence[str]


def write_sheet(folder: Path, step: int, sheet: Sheet) -> TrackedImages:
    """Write a sheet into a folder; returns it as what trackers take."""
    folder.mkdir(exist_ok=True)
    write_png(folder / f"step-{step:06d}.png", grid(sheet.images, sheet.columns))
    return TrackedImages(sheet.images, sheet.captions)


def make_on_eval(
    config: Any, trainable: Trainable, held_out: HeldOut, samples: Path | None, at_once: int
) -> OnEval | None:
    """The evaluation of a stage; None if there is nothing to evaluate.

    Args:
        config: all settings.
        samples: a folder for sheets; None, as on all hosts but the first, draws none.
        at_once: images per device and call.
    """
    if config.stage == "clip":
        return clip_on_eval(trainable, held_out)
    if config.stage in AUTOENCODERS:
        return vae_on_eval(trainable, held_out, samples)
    if config.stage == "super_resolution":
        return upscaler_on_eval(trainable, held_out, samples)
    return denoiser_on_eval(config, trainable, held_out, samples, at_once)


def clip_on_eval(trainable: Trainable, held_out: HeldOut) -> OnEval | None:
    """The share of images whose own caption is the most similar."""
    batches = [trainable.stage.prepare(batch) for batch in held_out()]
    if not batches:
        return None
    evaluate = retrieval(trainable.model, batches)
    return lambda step, params: evaluate(params)


def vae_on_eval(trainable: Trainable, held_out: HeldOut, samples: Path | None) -> OnEval | None:
    """PSNR of the autoencoder's reconstructions, and a sheet of images beside them."""
    batches = [batch["image"] for batch in held_out()]
    if not batches:
        return None
    images, evaluate = np.concatenate(batches), reconstructions(trainable.model, batches)

    def on_eval(step: int, params: Params) -> Mapping[str, float | TrackedImages]:
        reconstructed, values = evaluate(trainable.merge_params(params))
        if samples is None:
            return values
        pairs = np.stack([images, reconstructed], 1)[:MAX_PAIRS].reshape(-1, *images.shape[1:])
        sheet = Sheet(pairs, 8, ["given", "reconstructed"] * (len(pairs) // 2))
        return {**values, "samples": write_sheet(samples, step, sheet)}

    return on_eval


def upscaler_on_eval(trainable: Trainable, held_out: HeldOut, samples: Path | None) -> OnEval | None:
    """PSNR of enlarged held-out images beside bicubic enlargement, and a sheet: small, enlarged, original."""
    batches = [trainable.stage.prepare(batch) for batch in held_out()]
    if not batches:
        return None
    images, small = (np.concatenate([batch[name] for batch in batches]) for name in ("image", "hint"))
    evaluate = enlargements(trainable.upscaler, batches)
    scale = images.shape[1] // small.shape[1]
    shown = small.repeat(scale, axis=1).repeat(scale, axis=2)

    def on_eval(step: int, params: Params) -> Mapping[str, float | TrackedImages]:
        enlarged, values = evaluate(params)
        if samples is None:
            return values
        rows = np.stack([shown, enlarged, images], 1)[:MAX_PAIRS]
        sheet = Sheet(rows.reshape(-1, *images.shape[1:]), 6, ["given", "enlarged", "image"] * len(rows))
        return {**values, "samples": write_sheet(samples, step, sheet)}

    return on_eval


def denoiser_on_eval(
    config: Any, trainable: Trainable, held_out: HeldOut, samples: Path | None, at_once: int
) -> OnEval | None:
    """The loss by noise level if `data.eval_split` is set, and a sheet of samples for `eval.prompts`.

    A GAN only has the sheet. Models that need more than a prompt get inputs from held-out images, and without
    `eval.prompts` their captions.
    """
    if not (config.data.eval_split or config.eval.prompts):
        return None
    batches = held_out() if (config.data.eval_split and trainable.network) or trainable.sample_inputs else []
    measure = None
    if trainable.network and batches and config.data.eval_split:
        measure = noise_levels(
            trainable.model,
            [trainable.stage.prepare(batch) for batch in batches],
            network=trainable.network,
            merge_params=trainable.merge_params,
            seed=config.eval.seed,
        )
    draw = None if samples is None else make_draw(config.eval, trainable, batches, at_once)
    if draw is None and measure is None:
        return None

    def on_eval(step: int, params: Params) -> Mapping[str, float | TrackedImages]:
        params, values = place_params(params, trainable, config), dict[str, float | TrackedImages]()
        if draw and samples and (sheet := draw(step, trainable.merge_params(params))):
            values["samples"] = write_sheet(samples, step, sheet)
        return values | measure(params) if measure else values

    return on_eval


def place_params(params: Params, trainable: Trainable, config: Any) -> Params:
    """The parameters that the loss reads, on a device, in the dtypes of a training step (`config.frozen_dtype`)."""
    trained = trainable.stage.trainable
    names = {*trainable.model.modules, "controlnet", *trained} & set(params)

    def place(name: str, x: Any) -> Any:  # one array at a time, so that only one exists in both dtypes
        x = jax.device_put(x)
        return x if name in trained else cast_frozen(x, config)

    return {name: jax.tree.map(functools.partial(place, name), params[name]) for name in sorted(names)}


def make_draw(
    config: Any, trainable: Trainable, held_out: Sequence[Batch], at_once: int
) -> Callable[[int, Params], Sheet | None] | None:
    """A function (step, params) that samples the prompts of `config`; None if there are none.

    Models that need more than a prompt take a held-out image with each; a row of their sheet shows the input, the
    sample and the image. Without prompts they use the captions of some images. The sheet is None if a sample is not
    finite.

    Args:
        config: the group `eval` of the settings.
        at_once: prompts per device and call.
    """
    prompts: list[str] = list(config.prompts)
    sample_inputs, references = trainable.sample_inputs, dict[str, np.ndarray]()
    if sample_inputs and not held_out:
        return None
    if sample_inputs:
        texts = [text for batch in held_out for text in batch["text"]]
        prompts = prompts or texts[:CONTROLLED]
        indices = [i % len(texts) for i in range(len(prompts))]
        names = [name for name in ("image", "hint") if name in held_out[0]]
        references = {name: np.concatenate([batch[name] for batch in held_out])[indices] for name in names}
    if not prompts:
        return None
    options: dict[str, Any] = {}
    if not trainable.model.is_gan:
        options = {name: config[name] for name in ("steps", "scheduler")}
        options["guidance_scale"] = config.guidance_scale or None  # the model's own
    at_once *= jax.local_device_count()
    rows = [np.arange(i, min(i + at_once, len(prompts))) for i in range(0, len(prompts), at_once)]

    def inputs(rows: np.ndarray) -> SampleInputs:
        if sample_inputs is None:
            return {}, np.empty(0)
        return sample_inputs({name: x[rows] for name, x in references.items()})

    previews = inputs(np.arange(len(prompts)))[1]

    def draw(step: int, params: Params) -> Sheet | None:
        def generate_rows(rows: np.ndarray) -> Any:
            texts = [prompts[i] for i in rows]
            return generate(trainable.model, params, texts, seed=config.seed + rows, **options, **inputs(rows)[0])

        try:
            images = for_each(generate_rows, rows)
        except FloatingPointError as error:  # does not end the run
            logging.warning("No sheet of step %d: %s", step, error)
            return None
        if sample_inputs is None:
            return Sheet(images, min(len(images), 8), prompts)
        sheet = np.stack([previews, images, references["image"]], 1)
        captions = [f"{kind}: {prompt}" for prompt in prompts for kind in ("given", "drawn", "image")]
        return Sheet(sheet.reshape(-1, *images.shape[1:]), 3, captions)

    return draw
