"""The flags of train.py."""

import os
import re
from collections.abc import Iterable
from dataclasses import Field
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

import jaxdiff
from jaxdiff import stores
from jaxdiff.cli import hosts
from jaxdiff.cli.errors import Failure, UsageError
from jaxdiff.cli.flags import check_path
from jaxdiff.cli.options import HOSTS, define_one
from jaxdiff.io import hub
from jaxdiff.training.checks import check_settings
from jaxdiff.training.defaults import OPEN, RULES, current_name
from jaxdiff.training.options import Options, OptionsError
from jaxdiff.training.ranges import describe, suggest

PATHS = [name for name, field in RULES.items() if isinstance(field, Field) and field.metadata["path"]]
PLANNED = [name for name in PATHS if "init_from" in name]  # read by --plan
PACKAGE = Path(jaxdiff.__file__).parent
CONFIG_FOLDERS = (Path("configs"), PACKAGE / "configs", PACKAGE.parent / "configs")  # the last, of a checkout


def define(argv: list[str]) -> flags.FlagValues:
    """The flags, apart from absl's global ones; those of --config's settings are looked for in `argv`."""
    f = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config", None, "The experiment: a config file, or the name of one in configs/.", flag_values=f, sys_argv=argv
    )
    flags.DEFINE_string("workdir", None, "Folder for everything that the run writes; also at gs:// or s3://.", f)
    for option in HOSTS:
        define_one(f, option)
    flags.DEFINE_string(
        "plan", None, "Print each device's memory and communication instead of training; =quick compiles nothing.", f
    )
    flags.DEFINE_integer("plan_devices", 0, "Number of devices to plan for; 0: those of this machine.", flag_values=f)
    flags.DEFINE_integer(
        "profile", 0, "Write a trace of this many steps to the workdir's folder profile.", 0, flag_values=f
    )
    flags.DEFINE_bool(
        "precompute", False, "Only write the latents of all images to WORKDIR/latents, for config.latents.path.", f
    )
    flags.DEFINE_float(
        "posthoc_ema", None, "Only write WORKDIR/export-ema-LENGTH: the average of this length, a share of the run, "
        "out of the snapshots of config.ema_sigmas. Needs no --config.", flag_values=f,
    )  # fmt: skip
    flags.DEFINE_bool("overwrite", False, "With --posthoc_ema: replace an earlier average of this length.", f)
    flags.DEFINE_bool("verbose", False, "Show the traceback of an error.", f)
    flags.DEFINE_bool("help", False, "Show this help.", f, short_name="h")
    return f


def parse(argv: list[str]) -> flags.FlagValues:
    """The flags of a command line, checked.

    Args:
        argv: the command line, the program's name first.

    Raises:
        UsageError, OptionsError: one sentence naming the flag or setting.
    """
    argv = [argv[0], *map(resolve_argument, argv, argv[1:])]
    check_known(argv)
    f = define(argv)
    try:
        extra = f(argv)[1:]
        _ = f.config is not None and f.config.stage  # raises if the file could not be read
    except flags.UnrecognizedFlagError as e:
        known = list({*f, *(f"config.{name}" for name in RULES)})
        raise UsageError(f"--{e.flagname} is no flag: {suggest(e.flagname, known)}") from None
    except (flags.Error, OSError, LookupError, AttributeError, TypeError, ValueError, SyntaxError, ImportError) as e:
        raise UsageError(config_error(e)) from None
    if f.help:
        return f
    f.workdir = f.workdir and os.path.expanduser(f.workdir)
    if extra:
        raise UsageError(f"{extra[0]!r} belongs to no flag; --help shows all.")
    check_flags(f)
    if f.config is None:  # with --posthoc_ema
        return f
    check_settings(f.config)
    for name in PATHS:
        if reason := stores.wrong(f.config[name]):
            raise OptionsError(f"{name} {f.config[name]} {reason}")
        f.config.update_from_flattened_dict({name: os.path.expanduser(f.config[name])})
    f.config.warmup_steps = Options.from_config(f.config).warmup  # so that run.json has the number
    if f.profile and f.profile + 2 > f.config.steps:
        raise UsageError(f"--profile={f.profile} begins with the third step: config.steps is {f.config.steps}.")
    if not f.config.data.path and not f.plan:
        raise OptionsError("data.path is missing: name a captioned folder, --config.data.path=images/.")
    return f


def with_local_copies(config: Any, names: Iterable[str] = PATHS) -> Any:
    """A config in which paths of object stores are replaced by this machine's copies.

    Raises:
        Failure: there is nothing, or it cannot be read.
    """
    copied = config.copy_and_resolve_references()
    for name in names:
        try:
            copied.update_from_flattened_dict({name: stores.local(config[name], hub.chosen)})
        except stores.StoreError as e:
            raise Failure(f"--config.{name}: {e}") from None
    return copied


def check_flags(f: flags.FlagValues) -> None:
    """Raise UsageError for flags that are missing or do not go together."""
    if f.posthoc_ema is not None and not 0 < f.posthoc_ema < 12**-0.5:
        raise UsageError(f"--posthoc_ema={f.posthoc_ema:g} must be above 0 and below {12**-0.5:.3f}.")
    if f.overwrite and f.posthoc_ema is None:
        raise UsageError("--overwrite goes with --posthoc_ema: give that too, or leave --overwrite out.")
    if f.posthoc_ema is not None and f.workdir and f.config is None:
        check_path("--workdir", str(f.workdir), stored=True)
        return
    if f.config is None:
        raise UsageError("--config is missing: name the experiment, such as --config=lora.")
    if f.workdir:
        check_path("--workdir", str(f.workdir), stored=True)
    if not f.workdir and not f.plan:
        raise UsageError("--workdir is missing: name a folder for the run, such as --workdir=runs/vae.")
    hosts.check(f)


def check_known(argv: list[str]) -> None:
    """Raise UsageError for a flag of an unknown setting, or of a group of settings."""
    for name in (match[1] for a in argv[1:] if (match := re.match(r"--?config\.([\w.]+)", a))):
        if name in RULES or name.startswith(tuple(f"{group}." for group in OPEN)):
            continue
        if settings := [known for known in RULES if known.startswith(f"{name}.")]:
            raise UsageError(
                f"--config.{name} is a group of settings: give one of them, such as --config.{settings[0]}."
            )
        raise UsageError(f"--config.{name} is no setting: {suggest(name, list(RULES))}")


def find_config(name: str) -> str:
    """The file of a --config value, with what follows its colon: a path, or the name of a config.

    "lora" is `configs/finetune/lora.py` of the checkout, or the copy that is installed with the package.

    Raises:
        UsageError: no config has that name, or several have.
    """
    name = os.path.expanduser(name)
    stem, colon, argument = name.partition(":")
    if Path(stem).is_file() or not re.fullmatch(r"[\w/]+", stem):
        return name
    for folder in CONFIG_FOLDERS:
        matches = sorted(folder.glob(f"**/{stem}.py"))
        if len(matches) > 1:
            raise UsageError(f"--config={name} may be any of {', '.join(map(str, matches))}: give its path.")
        if matches:
            return f"{matches[0]}{colon}{argument}"
    known = sorted({path.stem for folder in CONFIG_FOLDERS for path in folder.glob("**/*.py")} - {"__init__"})
    raise UsageError(f"--config={name} is neither a file nor the name of a config; known are {', '.join(known)}.")


def resolve_argument(previous: str, argument: str) -> str:
    """An argument with the config's file resolved, old names of settings replaced, and --plan given a value."""
    if previous in ("-config", "--config"):
        return find_config(argument)
    if argument.lstrip("-") == "plan":
        return f"{argument}=full"
    if match := re.fullmatch(r"(--?config=)(.+)", argument):
        return match[1] + find_config(match[2])
    if match := re.fullmatch(r"(--?config\.)([\w.]+)(.*)", argument, re.DOTALL):
        return match[1] + current_name(match[2]) + match[3]
    return argument


def config_error(error: Exception) -> str:
    """One sentence for an error of ml_collections, whose text may hold a traceback."""
    text = " ".join(str(error).split())
    if match := re.match(r"flag --config\.([\w.]+)=(.*?): ", text):
        name, value = match.groups()
        if isinstance(field := RULES.get(name), Field):
            return f"--config.{name}={value} must be {describe(field)}."
    if match := re.fullmatch(r"[\"'\\]*(\w+)[\"'\\]*( ?Did you mean.*)?", text.replace("\\n", " ")):
        return f"--config gives no {match[1]!r}: a size of config.model can be changed where the config has it."
    return f"--config: {re.split(r'Error: |.Errno [0-9]+. ', text)[-1]}"
