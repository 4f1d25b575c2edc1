"""Train a text-to-image model, one stage at a time, or fine-tune one: fully, by LoRA, ControlNet and more.

    python train.py --config=configs/icons/vae.py --workdir=runs/vae
    python train.py --config=configs/icons/unet.py:cpu --workdir=runs/unet --config.batch_size=64

The config says what, see configs/; any of its settings may be given as a flag. In the workdir come to lie run.json (the
config, the versions of packages and a fingerprint of the data), checkpoints, metrics.jsonl, TensorBoard files (tb),
samples, and in the end the model as a diffusers folder (export). The same command goes on from the last checkpoint,
whatever ended the run; SIGTERM or Ctrl-C saves one first. Another config is refused there. Exit code: 0, also when
stopped so; 2 for flags or settings that cannot be right; 1 for any other failure.
"""

import json
import logging
import re
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from configs.common import base
from jaxdiff.commands import errors
from jaxdiff.commands.errors import UsageError
from jaxdiff.commands.outputs import make_folder

STAGES = ("clip", "vae", "unet", "lora", "textual_inversion", "controlnet", "inpainting", "upscaler")


def parse(argv: list[str]) -> flags.FlagValues:
    f = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "The experiment: a file of configs/.", flag_values=f)
    flags.DEFINE_string("workdir", None, "Folder of all that the run writes.", f)
    flags.DEFINE_bool(
        "distributed", False, "This is one of several processes, on a TPU pod or under Slurm: find the others.", f
    )
    flags.DEFINE_string("coordinator_address", None, "Where the first of several processes listens, host:port.", f)
    flags.DEFINE_integer(
        "num_processes", None, "How many processes there are, with --coordinator_address.", flag_values=f
    )
    flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.", flag_values=f)
    flags.DEFINE_string("plan", None, "Print memory and messages of each device instead of training; or =quick.", f)
    flags.DEFINE_integer("plan_devices", 0, "Devices to plan for; 0: those of this machine.", flag_values=f)
    flags.DEFINE_integer(
        "profile", 0, "Write a trace of this many steps to the workdir's folder profile.", 0, flag_values=f
    )
    flags.DEFINE_bool(
        "precompute", False, "Only write the latents of all pictures to WORKDIR/latents, for config.latents.path.", f
    )
    flags.DEFINE_bool("verbose", False, "Show the traceback of an error.", f)
    flags.DEFINE_bool("help", False, "Show this help.", f, short_name="h")
    try:
        rest = f([f"{a}=full" if a.lstrip("-") == "plan" else a for a in argv])[1:]
        stage = f.config is not None and f.config.stage  # raises where the file could not be read
    except (flags.Error, OSError, LookupError, AttributeError, TypeError, ValueError, SyntaxError, ImportError) as e:
        raise UsageError(config_error(e)) from None
    if f.help:
        return f
    if rest:
        raise UsageError(f"{rest[0]!r} belongs to no flag; --help shows all.")
    if f.config is None:
        raise UsageError("--config is missing: name the experiment, such as --config=configs/icons/vae.py.")
    if not f.workdir and not f.plan:
        raise UsageError("--workdir is missing: name a folder for the run, such as --workdir=runs/vae.")
    among = f.num_processes, f.process_id
    if f.coordinator_address and (None in among or not 0 <= f.process_id < f.num_processes):
        raise UsageError("--coordinator_address needs --num_processes and a --process_id from 0 to one less.")
    if among != (None, None) and not f.coordinator_address:
        raise UsageError("--num_processes and --process_id need --coordinator_address=host:port.")
    if stage not in STAGES:
        raise UsageError(f"config.stage {stage!r} must be one of {', '.join(STAGES)}.")
    if not f.config.data.path and not f.plan:
        raise UsageError("config.data.path is missing: name a captioned folder, --config.data.path=pictures/.")
    return f


def config_error(error: Exception) -> str:
    """One sentence out of what ml_collections says, which may hold a whole traceback."""
    text = " ".join(str(error).split())
    if isinstance(error, LookupError):
        return f"--config has no setting {text.strip(chr(34))}; configs/common.py lists all."
    return f"--config: {re.split(r'Error: |.Errno [0-9]+. ', text)[-1]}"


class Run:
    """One run: its config and workdir, and what is made of them."""

    def __init__(self, config: Any, workdir: Path) -> None:
        import jax

        from jaxdiff.data.filters import select
        from jaxdiff.training import personalise, setup
        from jaxdiff.training.state import Options

        self.config, self.workdir = config, workdir
        self.options = Options(**{name: config[name] for name in Options.__dataclass_fields__})
        self.options.check(jax.device_count())
        hosts = jax.process_count()
        if self.options.batch_size % hosts:
            raise UsageError(f"config.batch_size {self.options.batch_size} must be divisible by {hosts} hosts.")
        self.host = {"host_index": jax.process_index(), "host_count": hosts}
        data = config.data
        self.target: Any = None  # of a stage that teaches a denoiser
        path = data.path
        if data.captions:
            captions = [c.replace("{}", config.word.token) for c in data.captions]
            path = personalise.captioned(path, captions, workdir / "captioned")
        self.data = select(self.open(path, data.split), data.filter.to_dict(), cache=workdir / "data", **self.host)
        self.model, self.params = setup.starting_model(
            config.model.to_dict(), config.init_from.to_dict(), self.make_tokenizer,
            jax.random.key(config.seed), dtype=config.dtype, remat=config.remat,
        )  # fmt: skip
        self.image_size = data.image_size or self.model.unet.config.sample_size * self.model.vae.config.factor
        self.buckets = setup.buckets(self.data, data, self.image_size, workdir / "data", **self.host)
        if self.buckets and (config.cache_latents or config.prior.path or config.crop):
            raise UsageError("config.data.buckets go with neither cache_latents (use --precompute), prior nor crop.")

    def open(self, path: str | Path, split: str):
        from jaxdiff.training.setup import open_data

        return open_data(path, split, self.config.data, self.workdir / "data", **self.host)

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
            "flip": d.flip, "buckets": self.buckets, "threads": d.threads, "workers": d.workers, **self.host,
        }  # fmt: skip
        return captioned_data(**(arguments | changes))

    def held_out(self) -> list[Mapping[str, Any]]:
        """Pictures set aside, the same on every host and each time."""
        d = self.config.data
        split = {"source": self.open(d.path, d.eval_split)} if d.eval_split else {}
        count = self.config.eval.pictures
        sizes = {"batch_size": min(count, 32), "epochs": 1, "drop_remainder": False, "workers": 0, "flip": False}
        sizes["buckets"] = None
        # Another order than in training, background colours included.
        stream = iter(self.batches(seed=self.config.seed + 1, host_index=0, host_count=1, **split, **sizes))
        found: list[Mapping[str, Any]] = []
        while sum(len(b["text"]) for b in found) < count and (batch := next(stream, None)) is not None:
            found.append(batch)
        return found

    def trackers(self):
        from jaxdiff.training.trackers import WandB

        w = self.config.wandb
        if not w.project or self.host["host_index"]:
            return ()
        return (WandB(w.project, w.name, as_json(self.config), self.workdir),)

    def train(self, profile: int) -> None:
        from jaxdiff.io.pretrained import save
        from jaxdiff.training.loop import fit

        stage, params, batches, on_eval = getattr(self, f"_{self.config.stage}", self._denoiser)()
        more = {"on_eval": on_eval, "trackers": self.trackers(), "profile": profile}
        result = fit(stage, params, batches, self.options, self.workdir, **more)
        if result.step < self.options.steps:
            return
        model = self.scaled(result.params) if self.config.stage == "vae" else self.model
        if self.host["host_index"] == 0:
            if self.target:
                self.target.export(self.workdir / "export", result.params)
            else:
                save(self.workdir / "export", model, {name: result.params[name] for name in model.modules})
            logging.info("What was trained is in %s.", self.workdir / "export")

    def scaled(self, params: Any):
        from jaxdiff.training.setup import measured

        alone = {"host_index": 0, "host_count": 1, "workers": 0, "buckets": None}
        stream = iter(self.batches(seed=self.config.seed + 2, batch_size=32, **alone))
        return measured(self.model, params, (next(stream)["image"] for _ in range(16)))

    def _clip(self):
        from jaxdiff.training.evaluate import retrieval
        from jaxdiff.training.stages import clip_params, clip_stage

        if self.model.vision_encoder is None:
            raise UsageError(
                "config.model.vision_encoder is missing: the clip stage trains one beside the text encoder."
            )
        stage = clip_stage(self.model)
        evaluate = retrieval(self.model, [stage.prepare(b) for b in self.held_out()])
        return stage, clip_params(self.params), self.batches(), lambda step, params: evaluate(params)

    def _vae(self):
        import numpy as np

        from jaxdiff.training.evaluate import reconstructions
        from jaxdiff.training.stages import vae_stage

        c = self.config
        images = np.concatenate([b["image"] for b in self.held_out()])
        evaluate = reconstructions(self.model, images)

        def on_eval(step: int, params: Any) -> Mapping[str, float]:
            pictures, values = evaluate(params)
            pairs = np.stack([images, pictures], 1)[:16].reshape(-1, *images.shape[1:])
            self.write_sheet(step, pairs, columns=8)
            return values

        stage = vae_stage(self.model, kl_weight=c.kl_weight, edge_weight=c.edge_weight)
        return stage, self.params, self.batches(crop=c.crop or None), on_eval

    def _denoiser(self):
        from jaxdiff.training import personalise, targets
        from jaxdiff.training.state import OptionsError

        c = self.config
        self.target = targets.make(c, self.model, self.params)
        self.model = self.target.model
        if c.cache_latents and (c.prior.path or not self.target.draws):
            raise OptionsError(f"cache_latents {c.cache_latents}: this stage needs the pictures themselves, hence 0.")
        if c.latents.path:
            batches = self.batches(source=self.precomputed(), buckets=None)
        else:
            batches = self.cached_batches() if c.cache_latents else self.batches()
        if c.prior.path:
            share = self.options.batch_size // self.host["host_count"] // 2
            if not share:
                raise OptionsError("batch_size must be 2 or more on each host, for the class pictures of prior.path.")
            own = self.batches(batch_size=self.options.batch_size // self.host["host_count"] - share)
            path = c.prior.path
            if c.prior.captions:
                path = personalise.captioned(path, c.prior.captions, self.workdir / "class")
            prior = self.batches(source=self.open(path, "train"), batch_size=share, seed=c.seed + 3)
            batches = personalise.WithPrior(own, prior, c.prior.weight)
        return self.target.stage, self.target.params, batches, self.evaluation(self.target)

    def evaluation(self, target: Any):
        """Of what draws from a prompt: the loss by noise level on pictures set aside, and drawings of the prompts."""
        from jaxdiff.training.evaluate import noise_levels

        c = self.config
        if not (c.data.eval_split or c.eval.prompts) or not target.draws:
            return None
        held_out = [target.stage.prepare(b) for b in self.held_out()] if c.data.eval_split else []
        measure = noise_levels(self.model, held_out, seed=c.eval.seed) if held_out else None

        def on_eval(step: int, params: Any) -> Mapping[str, float]:
            params = target.whole(params)
            if c.eval.prompts:
                self.draw(step, params)
            return measure(params) if measure else {}

        return on_eval

    def precompute(self) -> None:
        from jaxdiff.training.precompute import precompute

        c, folder = self.config, self.workdir / "latents"
        how = {"views": c.latents.views, "embeddings": c.latents.embeddings, "buckets": self.buckets}
        how |= {"flip": c.data.flip, "background": c.data.background, "threads": c.data.threads, **self.host}
        precompute(self.model, self.params, self.data, folder, image_size=self.image_size, seed=c.seed, **how)
        logging.info("The latents are in %s; --config.latents.path=%s trains on them.", folder, folder)

    def precomputed(self):
        from jaxdiff.training.precompute import open_latents

        c = self.config
        if c.cache_latents or c.prior.path or not self.target.draws:
            raise UsageError(
                "config.latents.path goes with neither cache_latents, prior nor a stage that needs pictures."
            )
        return open_latents(Path(c.latents.path), self.model, self.params, c.trainable)

    def cached_batches(self):
        from jaxdiff.training.latents import FromMemory, cached, encode_all, fingerprint

        c = self.config
        mark = fingerprint(
            self.model, self.params, [c.cache_latents, c.seed, c.data.to_dict(), self.host, self.data.digest]
        )

        def make():
            views = self.batches(batch_size=32, epochs=c.cache_latents, drop_remainder=False)
            return encode_all(self.model, self.params, views)

        arrays = cached(self.workdir / f"latents-{self.host['host_index']}.npz", mark, make)
        return FromMemory(arrays, self.options.batch_size // self.host["host_count"], c.seed + self.host["host_index"])

    def draw(self, step: int, params: Any) -> None:
        import jaxdiff

        e = self.config.eval
        if self.host["host_index"] == 0:
            names = ("seed", "steps", "guidance_scale", "scheduler")
            pictures = jaxdiff.generate(self.model, params, list(e.prompts), **{n: e[n] for n in names})
            self.write_sheet(step, pictures, columns=min(len(pictures), 8))

    def write_sheet(self, step: int, pictures: Any, columns: int) -> None:
        from jaxdiff.io.images import grid, write_png

        if self.host["host_index"] == 0:
            (self.workdir / "samples").mkdir(exist_ok=True)
            write_png(self.workdir / "samples" / f"step-{step:06d}.png", grid(pictures, columns))


def run(f: flags.FlagValues) -> None:
    import jax

    from jaxdiff.io.cache import cache_compilations
    from jaxdiff.training.state import OptionsError
    from jaxdiff.training.workdir import Lock, data_fingerprint, settle

    workdir = Path(f.workdir)
    make_folder(workdir, "--workdir")
    if f.distributed or f.coordinator_address:
        # What is not given comes from the environment of a TPU pod, Slurm or Open MPI.
        jax.distributed.initialize(f.coordinator_address, f.num_processes, f.process_id)
    cache_compilations()
    first = jax.process_index() == 0
    with Lock(workdir) if first else nullcontext():
        settle(workdir, as_json(f.config), data_fingerprint(f.config.data.path), as_json(base()), write=first)
        try:
            this = Run(f.config, workdir)
            this.precompute() if f.precompute else this.train(f.profile)
        except OptionsError as e:
            raise UsageError(f"config: {e}") from None


def as_json(config: Any) -> dict[str, Any]:
    return json.loads(config.to_json_best_effort())


def from_jaxdiff(record: logging.LogRecord) -> bool:
    """What orbax logs comes as an error as well, if it is one."""
    return "orbax" not in Path(record.pathname).parts


def command(argv: list[str]) -> None:
    f = parse(argv)
    if f.help:
        print(__doc__, f.get_help(), sep="\n")
    elif f.plan:
        from jaxdiff.commands import plan

        plan.run(f.config, f.plan, f.plan_devices, [__file__, *argv[1:]])
    else:
        run(f)


def main(argv: list[str]) -> int:
    """Run a command line; returns the exit code."""
    logging.basicConfig(format="train.py: %(message)s", level=logging.WARNING)
    logging.getLogger().setLevel(logging.INFO)
    for noisy in ("jax", "orbax", "absl"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("absl").addFilter(from_jaxdiff)
    return errors.run(
        "train.py",
        argv,
        command,
        smaller="lower config.batch_size, raise config.accumulate, or use config.remat=full",
        stopped="the same command goes on from the last checkpoint",
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv))
