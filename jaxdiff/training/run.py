"""A training run, built in one pass from a config, a workdir and the devices.

    config -> Images -> model and parameters -> Trainable -> TrainingData -> batches -> `fit` -> export

`trainables` defines what is trained, `run_data` which images, `on_eval` the evaluation, `train_step` one update, and
`loop` the loop.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
from absl import logging

from jaxdiff import stores
from jaxdiff.data.folder import Warp
from jaxdiff.data.latents import LatentShards
from jaxdiff.data.pipeline import CaptionedData
from jaxdiff.models.model import Model
from jaxdiff.training import init, remote, super_resolution, trainables
from jaxdiff.training.checks import check_memory, check_sizes, image_size, too_long
from jaxdiff.training.defaults import as_json
from jaxdiff.training.ema import reconstruct
from jaxdiff.training.loop import fit
from jaxdiff.training.on_eval import OnEval, make_on_eval
from jaxdiff.training.options import Options, OptionsError
from jaxdiff.training.precompute import fingerprint, open_latents, precompute
from jaxdiff.training.ranges import naming
from jaxdiff.training.run_data import Images, TrainingData, hosts
from jaxdiff.training.trackers import Tracker, WandB
from jaxdiff.training.trainables import Trainable, save_model
from jaxdiff.typing import PRNG, Params


@dataclasses.dataclass(frozen=True)
class Run:
    """One run; `build_run` makes it."""

    config: Any
    workdir: Path
    options: Options
    trainable: Trainable
    data: TrainingData

    def train(self, profile: int = 0) -> None:
        """Train to the last step, or until stopped, and export what was trained; `profile` as for `fit`."""
        stage, params = self.trainable.stage, self.trainable.params
        batches, on_eval = self.batches(), self.on_eval()
        result = fit(
            stage, params, batches, self.options, self.workdir,
            on_eval=on_eval, trackers=self.trackers(), profile=profile,
        )  # fmt: skip
        if result.step == self.options.steps:
            self.export("export", result.params)

    def batches(self) -> CaptionedData:
        """The training batches: precomputed latents, latents cached now, or images."""
        config = self.config
        if config.latents.path:
            return self.data.batches(source=self.latents(), buckets=None)
        if config.cache_latents:
            return self.data.batches(source=self.cached_latents(), buckets=None)
        if config.prior_preservation.path:
            return self.data.with_class_images()
        if config.super_resolution.photographs:
            return self.data.with_photographs(crop=config.crop or None)
        return self.data.batches(crop=config.crop or None)

    def on_eval(self) -> OnEval | None:
        samples = self.workdir / "samples" if jax.process_index() == 0 else None
        return make_on_eval(self.config, self.trainable, self.data.held_out, samples, self.data.at_once)

    def trackers(self) -> tuple[Tracker, ...]:
        wandb = self.config.wandb
        if not wandb.project or jax.process_index():
            return ()
        return (WandB(wandb.project, wandb.name, as_json(self.config), self.workdir),)

    def precompute(self, folder: Path, views: int, embeddings: bool) -> None:
        """Write the latents of all images, see `jaxdiff.training.precompute`."""
        config, data = self.config, self.data
        if self.trainable.model is None:
            raise OptionsError(f"stage {config.stage} learns from images, not latents: leave --precompute out.")
        if stores.behind(folder) and jax.process_count() > 1:
            raise OptionsError(f"latents of {stores.shown(folder)} cannot be written by several hosts, which share no "
                               "folder there: write them on one, for latents.path.")  # fmt: skip
        precompute(
            self.trainable.model, self.trainable.params, data.source, folder,
            image_size=data.image_size, seed=config.seed, views=views, buckets=data.buckets, embeddings=embeddings,
            flip=config.data.flip, warp=Warp(**config.data.warp), background=config.data.background,
            threads=config.data.threads, batch_size=config.latents.batch_size, made=data.settings(), **hosts(),
        )  # fmt: skip
        remote.publish(folder)

    def latents(self) -> LatentShards:
        """The precomputed latents of `config.latents.path`."""
        path, model, params = Path(self.config.latents.path), self.trainable.model, self.trainable.params
        with naming("latents.path"):
            return open_latents(path, model, params, self.config.trainable, self.data.settings())

    def cached_latents(self) -> LatentShards:
        """Latents in the workdir, computed now if missing. Each combination of settings has its own folder."""
        config, model, params = self.config, self.trainable.model, self.trainable.params
        settings = {name: value for name, value in config.data.to_dict().items() if name not in ("threads", "workers")}
        digest = fingerprint(model, params, [config.cache_latents, config.seed, settings, self.data.source.digest])
        folder = self.workdir / f"latents-{digest[:8]}"
        self.precompute(folder, config.cache_latents, embeddings=False)
        return open_latents(folder, model, params, config.trainable)

    def posthoc_ema(self, sigma: float) -> None:
        """Export the average of relative width `sigma`, reconstructed from the snapshots of `ema_sigmas`."""
        self.export(posthoc_name(sigma), reconstruct(self.workdir / "ema", sigma, self.trainable.params))

    def export(self, name: str, params: Params) -> None:
        """Write what was trained into a folder of the workdir, on the first host."""
        if jax.process_index():
            return
        export = self.trainable.export
        if "vae" in self.trainable.stage.trainable:  # its latents have another standard deviation now
            export = save_model(init.with_measured_scaling(self.trainable.model, params, self.data.to_measure()))
        export(self.workdir / name, params)
        remote.publish(self.workdir / name)
        logging.info("What was trained is in %s.", stores.shown(self.workdir / name))


def posthoc_name(sigma: float) -> str:
    """The folder in the workdir for the average of this relative width."""
    return f"export-ema-{sigma:g}"


def build_run(config: Any, workdir: Path) -> Run:
    """The run of a config (see jaxdiff/training/defaults.py), which has passed `check_settings`.

    Raises:
        OptionsError, ConfigError, WeightsError: one sentence naming the setting or file.
    """
    options, devices, processes = Options.from_config(config), jax.device_count(), jax.process_count()
    options.check(devices)
    for sentence in too_long(config) if jax.process_index() == 0 else ():
        logging.warning("%s", sentence)
    if options.batch_size % processes:
        raise OptionsError(f"batch_size {options.batch_size} must be divisible by {processes} hosts.")
    images = Images(config, workdir)
    source = images.filtered(config.data.split)
    eval_source = images.filtered(config.data.eval_split) if config.data.eval_split and config.eval.images else source
    trainable, size = starting_point(config, images)
    buckets = images.buckets(source, size)
    at_once = max(1, options.batch_size // (devices * options.accumulate))
    data = TrainingData(images, source, eval_source, size, buckets, at_once, trainable.make_control_image)
    run = Run(config, workdir, options, trainable, data)
    for name in ("latents.path", "cache_latents"):
        if config[name] and trainable.sample_inputs:
            raise OptionsError(f"{name} {config[name]}: this stage needs the images themselves; leave it out.")
    if config.latents.path:
        run.latents()  # refuses latents that were written with other settings
    return run


def starting_point(config: Any, images: Images) -> tuple[Trainable, int]:
    """What is trained, and the side of the training images in pixels."""
    if config.stage == "super_resolution":
        return super_resolution.make(config), config.data.image_size

    def check(model: Model) -> None:
        check_sizes(config, model)
        check_memory(config, model, jax.device_count())

    model, params = init.starting_model(
        config.model.to_dict(), config.init_from.to_dict(), images.tokenizer, jax.random.key(config.seed, impl=PRNG),
        dtype=config.dtype, remat=config.remat or False, check=check,
    )  # fmt: skip
    return trainables.make(config, model, params), image_size(config, model)
