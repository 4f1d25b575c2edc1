"""One table of options: flags, documentation and arguments all follow it."""

import configparser
import importlib
import inspect
from pathlib import Path

import pytest

from jaxdiff.cli.errors import UsageError
from jaxdiff.cli.flags import flag_errors, parse
from jaxdiff.cli.options import OPTIONS, define, document
from jaxdiff.errors import ArgumentError
from jaxdiff.io.images import write_png
from jaxdiff.sampling.generate import generate
from jaxdiff.sampling.resolve import resolve_images, resolve_settings

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs" / "flags.md"
KEPT = {"prompt": "a castle, red", "seed": 9, "steps": 7, "emphasis": False, "guidance_interval": [0.5, 3.0],
        "lora": ["a.safetensors:0.5", "b.safetensors"], "preview": True, "batch_size": 3}  # fmt: skip


def test_the_documentation_is_the_table():
    """docs/flags.md is made by `python -m jaxdiff.cli.options`."""
    assert DOCS.read_text(encoding="utf-8") == document()


def test_installed_commands_exist():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    commands = setup["options.entry_points"]["console_scripts"].split("\n")[1:]
    assert "jaxdiff-sample = jaxdiff.cli.sample:main" in commands
    for module, _, function in (command.split(" = ")[1].partition(":") for command in commands):
        assert callable(getattr(importlib.import_module(module), function))


def test_every_option_is_a_flag():
    assert set(define()) - {"help", "h"} == set(OPTIONS)
    for option in OPTIONS.values():
        assert not option.needs or option.needs in OPTIONS


@pytest.mark.parametrize(
    ("parts", "function"), [(("settings",), resolve_settings), (("image", "prompts"), resolve_images)]
)
def test_options_are_arguments(parts, function):
    """Every option that says so, under one name here, there and in `generate`, with one default."""
    known, public = inspect.signature(function).parameters, inspect.signature(generate).parameters
    for option in OPTIONS.values():
        if option.part in parts:
            name = option.argument or option.name
            assert name in known, name
            assert known[name].default == public[name].default, name
            if option.default not in (None, []):
                assert public[name].default == option.default, name


def test_errors_name_the_flag_of_an_argument():
    for argument, flag in (("steps", "--steps"), ("prompts_2", "--prompt_2"), ("control_images", "--control_image")):
        with pytest.raises(UsageError, match=f"^{flag} is wrong"), flag_errors():
            raise ArgumentError(argument, "is wrong.")


@pytest.fixture
def png(tmp_path):
    write_png(tmp_path / "x.png", [[[0, 0, 0]]], KEPT)
    return tmp_path / "x.png"


def test_flags_of_a_png(png):
    f = parse(["sample.py", f"--from_png={png}"])
    assert (f.prompt, f.seed, f.steps, f.emphasis, f.preview) == (["a castle, red"], 9, 7, False, True)
    assert (f.guidance_interval, f.lora) == ((0.5, 3.0), KEPT["lora"])
    f = parse(["sample.py", f"--from_png={png}", "--prompt=a dog", "--prompt=a cat", "--lora=c", "--nopreview"])
    assert (f.prompt, f.lora, f.preview, f.steps) == (["a dog", "a cat"], ["c"], False, 7)
    (png.parent / "p.txt").write_text("a fox")
    assert parse(["sample.py", f"--from_png={png}", f"--prompts_file={png.parent}/p.txt"]).prompt == []


def test_flags_of_a_png_that_are_not_known(png):
    write_png(png, [[[0, 0, 0]]], {"prompt": "a", "colour": "red"})
    with pytest.raises(UsageError, match=r"x\.png holds colour, which is not a flag"):
        parse(["sample.py", f"--from_png={png}"])
