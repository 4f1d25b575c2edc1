"""Train a text-to-image model, one stage at a time, or fine-tune one: fully, by LoRA, ControlNet and more.

    python train.py --config=configs/icons/vae.py --workdir=runs/vae
    python train.py --config=configs/icons/unet.py:cpu --workdir=runs/unet --config.batch_size=64
    jaxdiff-train --config=lora --workdir=runs/lora --config.data.path=images/

The config defines the experiment, see configs/; any of its settings may be given as a flag. The workdir receives
run.json (the config, the versions of packages and a fingerprint of the data), checkpoints, metrics.jsonl, TensorBoard
files (tb), samples, and at the end the model as a diffusers folder (export). The same command resumes from the last
checkpoint; SIGTERM or Ctrl-C saves one first. A workdir refuses another config. Exit code: 0, also after SIGTERM or
Ctrl-C; 130 if Ctrl-C is pressed before training starts or a second time; 2 for wrong flags or settings; 1 for any other
failure.
"""

import logging
import sys
from pathlib import Path
from typing import Any

from absl import flags

import jaxdiff
from jaxdiff import stores
from jaxdiff.cli import errors, hosts, train_plan
from jaxdiff.cli.errors import Failure, UsageError
from jaxdiff.cli.train_flags import PLANNED, parse, with_local_copies
from jaxdiff.training.defaults import as_json, base
from jaxdiff.training.options import OptionsError


def run(f: flags.FlagValues) -> None:
    import jax

    from jaxdiff.io.cache import cache_compilations
    from jaxdiff.training import remote
    from jaxdiff.training.run import build_run, posthoc_name
    from jaxdiff.training.run_data import fingerprints
    from jaxdiff.training.workdir import claimed, settle

    if f.precompute and f.config.latents.path:
        raise UsageError("--precompute writes latents of images: leave out config.latents.path.")
    if f.posthoc_ema is not None:
        workdir = remote.workdir(f.workdir)
        export = workdir / posthoc_name(f.posthoc_ema)
        url = stores.behind(export)
        if (stores.listing(url) if url else export.exists()) and not f.overwrite:
            raise UsageError(f"--posthoc_ema={f.posthoc_ema:g}: {export} exists: move it, or give --overwrite.")
        remote.pull(workdir, snapshots=True)
        config = with_local_copies(f.config or stored_run_config(workdir))
        if not any((workdir / "ema").glob("*.safetensors")):
            raise Failure(f"{workdir / 'ema'} holds no snapshots of averages: set config.ema_sigmas when training.")
        return build_run(config, workdir).posthoc_ema(f.posthoc_ema)
    hosts.start(f)
    cache_compilations()
    workdir, first, config = remote.workdir(f.workdir), jax.process_index() == 0, with_local_copies(f.config)
    data = fingerprints(config)
    with claimed(workdir, first) as keep, remote.held(workdir, first) as begin_uploads:
        hosts.check_consistent(None if stores.behind(workdir) else workdir, data)
        run = as_json(f.config), data, as_json(base())
        settle(workdir, *run, write=False)
        training_run = build_run(config, workdir)
        keep()
        settle(workdir, *run, write=first)
        begin_uploads()
        if not f.precompute:
            return training_run.train(f.profile)
        folder, latents = workdir / "latents", f.config.latents
        training_run.precompute(folder, latents.views, latents.embeddings)
        folder_name = stores.shown(folder)
        logging.info("The latents are in %s; --config.latents.path=%s trains on them.", folder_name, folder_name)


def stored_run_config(workdir: Path) -> Any:
    """The config with which a run was started."""
    from jaxdiff.training.workdir import stored_config

    config = base()
    with config.unlocked(), config.ignore_type():
        config.update(stored_config(workdir))
    return config


def from_jaxdiff(record: logging.LogRecord) -> bool:
    """A filter of absl's log: keeps jaxdiff's messages and others' warnings, except orbax's."""
    path = Path(record.pathname)
    ours = Path(jaxdiff.__file__).parent in path.parents
    return ours or (record.levelno >= logging.WARNING and "orbax" not in path.parts)


def command(argv: list[str]) -> int:
    workdir = None
    try:
        f = parse(argv)
        workdir = f.workdir
        if f.help:
            print(__doc__, f.get_help(), sep="\n")
        elif f.plan:
            return train_plan.run(with_local_copies(f.config, PLANNED), f.plan, f.plan_devices, argv)
        else:
            run(f)
    except OptionsError as e:  # begins with a setting's name
        raise UsageError(f"config.{e}") from None
    except OSError as e:
        if isinstance(e, BrokenPipeError):  # of stdout
            raise
        raise Failure(
            f"{e.filename or workdir} cannot be read or written ({e.strerror or e}): mend that, and the same command "
            "goes on from the last checkpoint; or choose another place."
        ) from e
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run a command line, by default the process's own; returns the exit code."""
    argv = sys.argv if argv is None else argv
    name = Path(argv[0]).name
    logging.basicConfig(format=f"{name}: %(message)s", level=logging.WARNING)
    logging.getLogger().setLevel(logging.INFO)
    for noisy in ("jax", "orbax"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("absl").setLevel(logging.INFO)
    logging.getLogger("absl").addFilter(from_jaxdiff)
    return errors.run(
        name,
        argv,
        command,
        smaller="lower config.batch_size (of latents written beforehand: config.latents.batch_size), raise "
        "config.accumulate, or use config.remat=full",
        stopped="the same command goes on from the last checkpoint",
    )
