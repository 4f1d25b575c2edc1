"""Train a text-to-image model, one stage at a time, or fine-tune one: fully, by LoRA, ControlNet and more.

    python train.py --config=configs/icons/vae.py --workdir=runs/vae
    python train.py --config=configs/icons/unet.py:cpu --workdir=runs/unet --config.batch_size=64

The config says what, see configs/; any of its settings may be given as a flag. The workdir receives run.json (the
config, the versions of packages and a fingerprint of the data), checkpoints, metrics.jsonl, TensorBoard files (tb),
samples, and in the end the model as a diffusers folder (export). The same command goes on from the last checkpoint,
whatever ended the run; SIGTERM or Ctrl-C saves one first. Another config is refused there. Exit code: 0, also when
stopped so; 130 when Ctrl-C ends it before training or a second time; 2 for flags or settings that cannot be right; 1
for any other failure.
"""

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from absl import flags

from configs.common import base
from jaxdiff.cli import errors
from jaxdiff.cli.errors import UsageError
from jaxdiff.cli.outputs import make_folder
from jaxdiff.commands.train_flags import STAGES, check_sizes, parse
from jaxdiff.typing import PRNG

__all__ = ["STAGES", "main"]


class Run:
    """One run: its config and workdir, and what is made of them."""

    def __init__(self, config: Any, workdir: Path) -> None:
        import jax

        from jaxdiff.data.filters import select
        from jaxdiff.training import setup
        from jaxdiff.training.state import Options

        self.config, self.workdir = config, workdir
        self.options = Options(**{name: config[name] for name in Options.__dataclass_fields__})
        self.options.check(jax.device_count())
        # Pictures that one device is given at a time outside of training, as many as in a part of a step.
        self.at_once = max(1, self.options.batch_size // (jax.device_count() * self.options.accumulate))
        hosts = jax.process_count()
        if self.options.batch_size % hosts:
            raise UsageError(f"config.batch_size {self.options.batch_size} must be divisible by {hosts} hosts.")
        self.host = {"host_index": jax.process_index(), "host_count": hosts}
        data = config.data
        self.target: Any = None  # of a stage that teaches a denoiser
        self.data = self.pictures(data.split)
        if not config.latents.path:  # which holds what was chosen and cut when it was written
            self.data = select(self.data, data.filter.to_dict(), cache=workdir / "data", **self.host)
        self.model, self.params = setup.starting_model(
            config.model.to_dict(), config.init_from.to_dict(), self.make_tokenizer,
            jax.random.key(config.seed, impl=PRNG), dtype=config.dtype, remat=config.remat or False,
            check=lambda model: check_sizes(config, model),
        )  # fmt: skip
        self.image_size = data.image_size or self.model.unet.config.side * self.model.vae.config.factor
        self.buckets: Any = None
        if not config.latents.path:
            self.buckets = setup.buckets(self.data, data, self.image_size, workdir / "data", **self.host)
        if self.buckets and (config.prior.path or config.crop):
            raise UsageError("config.data.buckets go with neither prior nor crop.")
        self.sheet: Any = None  # the pictures drawn last

    def open(self, path: str | Path, split: str):
        from jaxdiff.training.setup import open_data

        return open_data(path, split, self.config.data, self.workdir / "data", **self.host)

    def pictures(self, split: str):
        """The pictures of a split, under the captions of the config where it has some."""
        from jaxdiff.training import personalise

        data, folder = self.config.data, Path(self.config.data.path)
        if not data.captions:
            return self.open(data.path, split)
        if split != data.split or (folder / split).is_dir():
            folder /= split
        captions = [c.replace("{}", self.config.word.token) for c in data.captions]
        personalise.captioned(folder, captions, self.workdir / "captioned" / split)
        return self.open(self.workdir / "captioned", split)

    def make_tokenizer(self):
        from jaxdiff.data.folder import BACKGROUNDS
        from jaxdiff.training.setup import corpus_tokenizer

        # Of the whole set, so that every subset of it gets the same vocabulary.
        names = [f"on a {name} background" for name in BACKGROUNDS] * 2
        data, tokenizer = self.config.data, self.config.tokenizer
        return corpus_tokenizer(self.open(data.path, data.split), tokenizer.vocab_size, tokenizer.max_length, names)

    def batches(self, **changes: Any):
        """Training batches of this host; changes as arguments of `captioned_data`."""
        from jaxdiff.data.captioned import captioned_data

        d = self.config.data
        arguments = {
            "source": self.data, "batch_size": self.options.batch_size // self.host["host_count"],
            "image_size": self.image_size, "seed": self.config.seed, "background": d.background,
            "flip": d.flip, "buckets": self.buckets, "threads": d.threads, "workers": d.workers,
            "steer": self.target.steer if self.target else None, **self.host,
        }  # fmt: skip
        return captioned_data(**(arguments | changes))

    def held_out(self) -> list[Mapping[str, Any]]:
        """Pictures set aside, the same on every host and each time; none where config.eval.pictures is 0."""
        d = self.config.data
        if not self.config.eval.pictures:
            return []
        split = {"source": self.pictures(d.eval_split)} if d.eval_split else {}
        left, found = self.config.eval.pictures, list[Mapping[str, Any]]()
        sizes = {"batch_size": min(left, self.at_once), "epochs": 1, "drop_remainder": False, "workers": 0}
        # Another order than in training, background colours included.
        how = {"seed": self.config.seed + 1, "flip": False, "buckets": None, "host_index": 0, "host_count": 1}
        stream = iter(self.batches(**split, **sizes, **how))
        while left > 0 and (batch := next(stream, None)) is not None:
            found.append({name: values[:left] for name, values in batch.items()})
            left -= len(batch["text"])
        return found

    def trackers(self):
        from jaxdiff.training.trackers import WandB

        w = self.config.wandb
        if not w.project or self.host["host_index"]:
            return ()
        return (WandB(w.project, w.name, as_json(self.config), self.workdir),)

    def parts(self):
        """(stage, its parameters, batches, what is called to evaluate) of the config's stage."""
        return getattr(self, f"_{self.config.stage}", self._denoiser)()

    def train(self, profile: int) -> None:
        from jaxdiff.training.loop import fit

        stage, params, batches, on_eval = self.parts()

        def evaluated(step: int, params: Any) -> Mapping[str, Any]:
            self.sheet = None
            values = on_eval(step, params)
            return values if self.sheet is None else {**values, "samples": self.sheet}

        more = {"on_eval": on_eval and evaluated, "trackers": self.trackers(), "profile": profile}
        result = fit(stage, params, batches, self.options, self.workdir, **more)
        if result.step == self.options.steps:
            self.export("export", result.params)

    def posthoc_ema(self, sigma: float) -> None:
        from jaxdiff.training.ema import reconstructed

        _, params, *_ = self.parts()
        self.export(f"export-ema-{sigma:g}", reconstructed(self.workdir / "ema", sigma, params))

    def export(self, name: str, params: Any) -> None:
        from jaxdiff.io.pretrained import parts, save

        model = self.scaled(params) if self.config.stage == "vae" else self.model
        if self.host["host_index"] == 0:
            if self.target:
                self.target.export(self.workdir / name, params)
            else:
                save(self.workdir / name, model, parts(model, params))
            logging.info("What was trained is in %s.", self.workdir / name)

    def scaled(self, params: Any):
        from jaxdiff.training.setup import measured

        alone = {"host_index": 0, "host_count": 1, "workers": 0, "buckets": None}
        stream = iter(self.batches(seed=self.config.seed + 2, batch_size=self.at_once, **alone))
        return measured(self.model, params, (next(stream)["image"] for _ in range(-(-512 // self.at_once))))

    def _clip(self):
        from jaxdiff.training.evaluate import retrieval
        from jaxdiff.training.stages import clip_params, clip_stage

        if self.model.vision_encoder is None:
            raise UsageError("config.model.vision_encoder is missing: the clip stage trains one beside the text.")
        stage, held_out = clip_stage(self.model), self.held_out()
        evaluate = retrieval(self.model, [stage.prepare(b) for b in held_out]) if held_out else None
        on_eval = evaluate and (lambda step, params: evaluate(params))
        return stage, clip_params(self.params), self.batches(), on_eval

    def _vae(self):
        import numpy as np

        from jaxdiff.training.evaluate import reconstructions
        from jaxdiff.training.stages import vae_stage

        c = self.config
        stage = vae_stage(self.model, kl_weight=c.kl_weight, edge_weight=c.edge_weight)
        batches, held_out = self.batches(crop=c.crop or None), [b["image"] for b in self.held_out()]
        if not held_out:
            return stage, self.params, batches, None
        images, evaluate = np.concatenate(held_out), reconstructions(self.model, held_out)

        def on_eval(step: int, params: Any) -> Mapping[str, float]:
            pictures, values = evaluate(params)
            pairs = np.stack([images, pictures], 1)[:16].reshape(-1, *images.shape[1:])
            self.write_sheet(step, pairs, 8, ["given", "reconstructed"] * (len(pairs) // 2))
            return values

        return stage, self.params, batches, on_eval

    def _denoiser(self):
        from jaxdiff.training import targets
        from jaxdiff.training.state import OptionsError

        c = self.config
        self.target = targets.make(c, self.model, self.params)
        self.model = self.target.model
        if c.cache_latents and (c.prior.path or self.target.given):
            raise OptionsError(f"cache_latents {c.cache_latents}: this stage needs the pictures themselves, hence 0.")
        if c.latents.path:
            batches = self.batches(source=self.latents(), buckets=None)
        elif c.cache_latents:
            batches = self.batches(source=self.cached_latents(), buckets=None)
        else:
            batches = self.batches()
        if c.prior.path:
            batches = self.with_prior()
        return self.target.stage, self.target.params, batches, self.evaluation(self.target)

    def with_prior(self):
        """Batches of which half are pictures of the class, in the same order for any number of hosts."""
        from jaxdiff.training import personalise
        from jaxdiff.training.state import OptionsError

        c, whole = self.config.prior, self.options.batch_size
        if whole < 2:
            raise OptionsError("batch_size must be 2 or more, for the class pictures of prior.path.")
        path = personalise.captioned(c.path, c.captions, self.workdir / "class") if c.captions else c.path
        alone = {"host_index": 0, "host_count": 1}
        own = self.batches(batch_size=whole - whole // 2, **alone)
        others = {"source": self.open(path, "train"), "seed": self.config.seed + 3}
        prior = self.batches(batch_size=whole // 2, **others, **alone)
        return personalise.with_prior(own, prior, c.weight, **self.host)

    def evaluation(self, target: Any):
        from jaxdiff.commands.evaluation import evaluation

        c = self.config
        if not (c.data.eval_split or c.eval.prompts):
            return None
        held_out = self.held_out() if c.data.eval_split or target.given else []
        write = None if self.host["host_index"] else self.write_sheet
        return evaluation(c, target, held_out, write, self.at_once)

    def precompute(self, folder: Path, views: int, embeddings: bool) -> None:
        from jaxdiff.training.precompute import precompute

        c = self.config
        how: dict[str, Any] = {"views": views, "embeddings": embeddings, "buckets": self.buckets}
        how |= {"flip": c.data.flip, "background": c.data.background, "threads": c.data.threads, **self.host}
        how |= {"batch_size": c.latents.batch_size, "made": self.data_settings()}
        precompute(self.model, self.params, self.data, folder, image_size=self.image_size, seed=c.seed, **how)

    def latents(self):
        from jaxdiff.training.precompute import open_latents

        c = self.config
        if c.cache_latents or c.prior.path or self.target.given:
            raise UsageError(
                "config.latents.path goes with neither cache_latents, prior nor a stage that needs pictures."
            )
        return open_latents(Path(c.latents.path), self.model, self.params, c.trainable, self.data_settings())

    def data_settings(self) -> dict[str, Any]:
        """What the config says of the pictures trained on, as JSON; they may lie elsewhere, but be no others."""
        from jaxdiff.training.workdir import data_fingerprint, flat

        d = as_json(self.config)["data"]
        digest = data_fingerprint(d.pop("path"), d["split"], bool(d["captions"]))["digest"]
        for name in ("threads", "workers", "eval_split"):
            del d[name]
        return {**flat({"data": d | {"image_size": self.image_size}}), "digest of data.path": digest}

    def cached_latents(self):
        from jaxdiff.training.precompute import fingerprint, open_latents

        c = self.config
        data = {name: x for name, x in c.data.to_dict().items() if name not in ("threads", "workers")}
        mark = fingerprint(self.model, self.params, [c.cache_latents, c.seed, data, self.data.digest])
        folder = self.workdir / f"latents-{mark[:8]}"  # of other settings, another
        self.precompute(folder, c.cache_latents, embeddings=False)
        return open_latents(folder, self.model, self.params, c.trainable)

    def write_sheet(self, step: int, pictures: Any, columns: int, captions: Sequence[str]) -> None:
        from jaxdiff.io.images import grid, write_png
        from jaxdiff.training.trackers import Pictures

        self.sheet = Pictures(pictures, captions)
        if self.host["host_index"] == 0:
            (self.workdir / "samples").mkdir(exist_ok=True)
            write_png(self.workdir / "samples" / f"step-{step:06d}.png", grid(pictures, columns))


def run(f: flags.FlagValues) -> None:
    import jax

    from jaxdiff.io.cache import cache_compilations
    from jaxdiff.training.state import OptionsError
    from jaxdiff.training.workdir import Lock, settle

    workdir = Path(f.workdir)
    if f.precompute and f.config.latents.path:
        raise UsageError("--precompute writes latents of pictures: leave out config.latents.path.")
    if f.posthoc_ema is not None:
        return Run(f.config or stored(workdir), workdir).posthoc_ema(f.posthoc_ema)
    make_folder(workdir, "--workdir")
    if f.distributed or f.coordinator_address:
        # What is not given comes from the environment of a TPU pod, Slurm or Open MPI.
        jax.distributed.initialize(f.coordinator_address, f.num_processes, f.process_id)
    cache_compilations()
    first = jax.process_index() == 0
    with Lock(workdir) if first else nullcontext():
        settle(workdir, as_json(f.config), fingerprints(f.config), as_json(base()), write=first)
        try:
            this = Run(f.config, workdir)
            if not f.precompute:
                return this.train(f.profile)
            folder, how = workdir / "latents", f.config.latents
            this.precompute(folder, how.views, how.embeddings)
            logging.info("The latents are in %s; --config.latents.path=%s trains on them.", folder, folder)
        except OptionsError as e:
            raise UsageError(f"config: {e}") from None


def fingerprints(config: Any) -> dict[str, Any]:
    """What tells the data of a run from others: its pictures, those of their class, and latents written beforehand."""
    from jaxdiff.data.latents import LatentShards
    from jaxdiff.training.workdir import data_fingerprint

    d, prior, latents = config.data, config.prior, config.latents.path
    found = data_fingerprint(d.path, d.split, bool(d.captions))
    if prior.path:
        found["prior"] = data_fingerprint(prior.path, captions=bool(prior.captions))
    return found | ({"latents": LatentShards(Path(latents)).fingerprint} if latents else {})


def stored(workdir: Path) -> Any:
    """The config that a run was begun with."""
    from jaxdiff.training.workdir import stored_config

    config = base()
    with config.unlocked(), config.ignore_type():
        config.update(stored_config(workdir))
    return config


def as_json(config: Any) -> dict[str, Any]:
    return json.loads(config.to_json_best_effort())


def from_jaxdiff(record: logging.LogRecord) -> bool:
    """Of absl's log: what jaxdiff says, and others' warnings; orbax's come as errors as well, if they are such."""
    path = Path(record.pathname)
    ours = Path(__file__).parent / "jaxdiff" in path.parents
    return ours or (record.levelno >= logging.WARNING and "orbax" not in path.parts)


def command(argv: list[str]) -> int:
    f = parse(argv)
    if f.help:
        print(__doc__, f.get_help(), sep="\n")
    elif f.plan:
        from jaxdiff.commands import plan

        return plan.run(f.config, f.plan, f.plan_devices, [__file__, *argv[1:]])
    else:
        run(f)
    return 0


def main(argv: list[str]) -> int:
    """Run a command line; returns the exit code."""
    logging.basicConfig(format="train.py: %(message)s", level=logging.WARNING)
    logging.getLogger().setLevel(logging.INFO)
    for noisy in ("jax", "orbax"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("absl").setLevel(logging.INFO)
    logging.getLogger("absl").addFilter(from_jaxdiff)
    return errors.run(
        "train.py",
        argv,
        command,
        smaller="lower config.batch_size (of latents written beforehand: config.latents.batch_size), raise "
        "config.accumulate, or use config.remat=full",
        stopped="the same command goes on from the last checkpoint",
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv))
