"""What train.py looks at while a denoiser learns: the loss on pictures set aside, and sheets of drawn prompts."""

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

import jaxdiff
from jaxdiff.training.evaluate import for_each, noise_levels
from jaxdiff.training.finetune import SampleInputs
from jaxdiff.training.train_step import cast_frozen
from jaxdiff.training.trainables import Trainable

Batch = Mapping[str, Any]
# (step, pictures uint8 [N, H, W, 3], columns, captions)
WriteSheet = Callable[[int, np.ndarray, int, Sequence[str]], None]
GIVEN = 4  # pictures drawn of what needs more than a prompt, where no prompts are given


def evaluation(
    config: Any, trainable: Trainable, held_out: Sequence[Batch], write: WriteSheet | None, at_once: int
) -> Callable[[int, Any], Mapping[str, float]]:
    """A function (step, params of the loss) -> the loss by noise level; each call writes a sheet as well.

    Args:
        config: of train.py; without `data.eval_split` there is no loss, and without `eval.prompts` only what draws from
            more than a prompt has sheets.
        trainable: what is trained.
        held_out: batches as they are read, or none: then there is neither a loss nor a sheet of what draws from more
            than a prompt. So many pictures are denoised at a time.
        write: None draws nothing, on all hosts but the first.
        at_once: prompts that each device draws at a time.
    """
    measure = None
    if config.data.eval_split and held_out:
        batches = [trainable.stage.prepare(batch) for batch in held_out]
        how = {"network": trainable.network, "merge_params": trainable.merge_params, "seed": config.eval.seed}
        measure = noise_levels(trainable.model, batches, **how)
    draw = None if write is None else drawing(config.eval, trainable, held_out, write, at_once)

    def on_eval(step: int, params: Any) -> Mapping[str, float]:
        if not draw and not measure:
            return {}
        params = placed(params, trainable, config)
        if draw:
            draw(step, trainable.merge_params(params))
        return measure(params) if measure else {}

    return on_eval


def placed(params: Any, trainable: Trainable, config: Any) -> Any:
    """What the loss reads of its parameters on a device, in the types of a training step, see `config.frozen_dtype`."""
    trained = trainable.stage.trainable
    read = {*trainable.model.modules, "controlnet", *trained} & set(params)

    def one(name: str, x: Any) -> Any:  # array by array, so that no more than one is there in float32 as well
        x = jax.device_put(x)
        return x if name in trained else cast_frozen(x, config)

    return {name: jax.tree.map(functools.partial(one, name), params[name]) for name in sorted(read)}


def drawing(
    config: Any, trainable: Trainable, held_out: Sequence[Batch], write: WriteSheet, at_once: int
) -> Callable[[int, Any], None] | None:
    """A function (step, params) that draws the prompts of `config`, None where there are none.

    What needs more than a prompt is given a picture set aside with each; a row of its sheet is what is given, what is
    drawn, and the picture itself. Without prompts it draws the captions of some pictures.

    Args: as for `evaluation`.
    """
    prompts: list[str] = list(config.prompts)
    pictures: dict[str, np.ndarray] = {}
    if trainable.sample_inputs and not held_out:
        return None
    if trainable.sample_inputs:
        texts = [text for batch in held_out for text in batch["text"]]
        prompts = prompts or texts[:GIVEN]
        chosen = [i % len(texts) for i in range(len(prompts))]
        names = [name for name in ("image", "hint") if name in held_out[0]]
        pictures = {name: np.concatenate([batch[name] for batch in held_out])[chosen] for name in names}
    if not prompts:
        return None
    options = {name: config[name] for name in ("steps", "scheduler")}
    options["guidance_scale"] = config.guidance_scale or None  # the model's own
    at_once *= jax.local_device_count()
    rows = [np.arange(i, min(i + at_once, len(prompts))) for i in range(0, len(prompts), at_once)]

    def given(rows: np.ndarray) -> SampleInputs:
        return (
            trainable.sample_inputs({name: x[rows] for name, x in pictures.items()})
            if trainable.sample_inputs
            else ({}, np.empty(0))
        )

    beside = given(np.arange(len(prompts)))[1]

    def draw(step: int, params: Any) -> None:
        def drawn_of(rows: np.ndarray) -> Any:
            more, chosen = given(rows)[0], [prompts[i] for i in rows]
            return jaxdiff.generate(trainable.model, params, chosen, seed=config.seed + rows, **options, **more)

        try:
            drawn = for_each(drawn_of, rows)
        except FloatingPointError as error:  # no reason to end a run
            logging.warning("No sheet of step %d: %s", step, error)
            return
        if not trainable.sample_inputs:
            write(step, drawn, min(len(drawn), 8), prompts)
        else:
            sheet = np.stack([beside, drawn, pictures["image"]], 1)
            captions = [f"{what}: {p}" for p in prompts for what in ("given", "drawn", "picture")]
            write(step, sheet.reshape(-1, *drawn.shape[1:]), 3, captions)

    return draw
