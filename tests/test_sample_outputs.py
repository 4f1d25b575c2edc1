"""The parts of sample.py one by one: names of files, known types, the cache of compiled programs, progress."""

from pathlib import Path

import jax
import pytest

from jaxdiff.cli import flags, options, sample
from jaxdiff.cli.errors import UsageError
from jaxdiff.cli.outputs import name_of, output_files, output_paths
from jaxdiff.cli.requests import image_requests, prompt_lines
from jaxdiff.io import cache
from jaxdiff.io.configs import DTYPES

IMAGES = [{"prompt": p, "seed": s} for p, s in (("a castle", 3), ("Ein Schloß, nachts", 4))]


@pytest.mark.parametrize(
    ("output", "count", "names", "sheet"),
    [
        ("castle.png", 1, ["castle.png"], "castle-grid.png"),
        ("castle.PNG", 1, ["castle.PNG"], "castle-grid.png"),
        ("castle.png", 2, ["castle-000.png", "castle-001.png"], "castle-grid.png"),
        ("out", 1, ["out/a-castle-003.png"], "out/grid.png"),
        ("out/", 2, ["out/a-castle-003.png", "out/ein-schloß-nachts-004.png"], "out/grid.png"),
        ("v1.5", 1, ["v1.5/a-castle-003.png"], "v1.5/grid.png"),
        ("a/{index}-{seed:02d}.png", 2, ["a/0-03.png", "a/1-04.png"], "a/grid.png"),
        ("{prompt}/x.png", 2, ["a-castle/x.png", "ein-schloß-nachts/x.png"], "a-castle/grid.png"),
    ],
)
def test_where_images_go(output, count, names, sheet):
    paths, sheet_path = output_paths(output, IMAGES[:count])
    assert [str(p) for p in paths] == names
    assert str(sheet_path) == sheet


@pytest.mark.parametrize(
    "output", ["{what}.png", "{index.png", "{0}.png", "{index:q}.png", "{prompt.x}.png", "{seed[0]}.png"]
)
def test_patterns_that_name_something_else(output):
    with pytest.raises(UsageError, match=r"may name \{prompt\}, \{seed\} and \{index\} only"):
        output_paths(output, IMAGES)


@pytest.mark.parametrize(
    ("output", "sentence"),
    [
        ("{index}.jpg", r"end it in \.png"),
        ("castle.jpg", r"images are written as PNG"),
    ],
)
def test_outputs_that_cannot_be(output, sentence):
    with pytest.raises(UsageError, match=sentence):
        output_paths(output, IMAGES[:1] * 2)


@pytest.mark.parametrize(
    ("args", "name"),
    [
        (["--prompt=a", "--prompt=A!"], "a.png"),
        (["--prompt=a", "--num_images=2"], "a.png"),
        (["--prompt=a", "--interpolate=2"], "a.png"),
        (["--prompt=Grid", "--prompt=a", "--grid"], "grid.png"),
        (["--prompt=a", "--prompt=a preview", "--preview"], "a-preview.png"),
    ],
)
def test_no_file_is_written_over_another_of_the_same_command(args, name):
    f = flags.parse(["sample.py", *args, "--output=o/{prompt}.png"])
    with pytest.raises(UsageError, match=rf"gives two files the name {name}: add \{{index\}} to it"):
        output_files(f, image_requests(f, prompt_lines(f)))
    f = flags.parse(["sample.py", *args, "--output=o/{prompt}-{index}.png"])
    files = output_files(f, image_requests(f, prompt_lines(f)))
    assert len({*files.images, *files.previews, files.sheet, files.animation}) == 2 * len(files.images) + 2


@pytest.mark.parametrize(
    ("prompt", "name"), [("A  cat_dog!", "a-cat-dog"), ("../../etc", "etc"), ("", "image"), ("火", "火")]
)
def test_names_of_prompts(prompt, name):
    assert name_of(prompt) == name


def test_long_prompts_make_names_that_file_systems_take():
    assert len(name_of("火" * 500).encode()) < 200


def test_known_dtypes_are_the_packages():
    parser = options.define()["dtype"].parser
    assert tuple(parser.enum_values) == DTYPES


def test_the_cache_folder_is_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.cache_folder() == tmp_path / "jaxdiff"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache.cache_folder() == Path("/home/someone/.cache/jaxdiff")


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, caplog):
    (tmp_path / "file").touch()
    before = jax.config.jax_compilation_cache_dir
    assert cache.cache_compilations(tmp_path / "file" / "cache") is None
    assert jax.config.jax_compilation_cache_dir == before
    assert "every run compiles again; name another --cache_dir" in caplog.text


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_shows_on_a_terminal_only(terminal, monkeypatch, capsys):
    monkeypatch.setenv("TTY_COMPATIBLE", str(int(terminal)))  # how rich is told
    monkeypatch.setenv("COLUMNS", "120")
    assert list(sample.with_progress(iter([[1, 2], [3]]), 3)) == [1, 2, 3]
    out, err = capsys.readouterr()
    assert out == ""
    assert ("3/3" in err and "images/s" in err) if terminal else err == ""
