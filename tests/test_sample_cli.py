"""sample.py: flags to files, one sentence for every mistake, and images that say how to draw them again."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import jaxdiff
from jaxdiff.cli import sample
from jaxdiff.errors import ImageError
from jaxdiff.io.diffusers_folder import load_model
from jaxdiff.io.images import read_image, read_metadata, write_png
from jaxdiff.io.model_paths import find
from jaxdiff.sampling.generate import Drawn
from jaxdiff.sampling.resolve import resolve_images
from tests.support.commands import CASTLE, STEPS
from tests.support.tiny import SIDE
from tests.support.written import existing

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_one_image_to_one_file(sample_cli):
    code, out, err = sample_cli("--prompt=a castle", STEPS, "--output=new/folder/castle.png")
    assert (code, out, err) == (0, ["new/folder/castle.png"], "")
    assert existing() == ["new/folder/castle.png"]
    assert read_image("new/folder/castle.png").shape == (SIDE, SIDE, 3)


@pytest.fixture
def six(sample_cli):
    """Six images, by default in two batches of three, with a sheet and strips."""
    flags = ("--prompt=a castle", "--prompt=A red dragon", "--num_images=3", "--seed=5")
    code, out, err = sample_cli(*flags, "--negative_prompt=blurry", "--grid", "--preview", STEPS, "--output=out")
    assert (code, err) == (0, "")
    return [Path(line) for line in out]


@pytest.mark.slow
def test_many_images_with_sheet_and_strips(six, sample_cli):
    names = [f"{p}-{i:03d}{end}.png" for i, p in zip(range(5, 11), ["a-castle"] * 3 + ["a-red-dragon"] * 3, strict=True)
             for end in ("", "-preview")]  # fmt: skip
    assert [p.name for p in six] == [*names, "grid.png"]
    assert existing("out") == sorted(p.name for p in six)
    images = [read_image(p) for p in six[:-1:2]]
    gap = 2
    sheet = read_image(six[-1])
    assert sheet.shape == (2 * SIDE + gap, 3 * SIDE + 2 * gap, 3)  # one row a prompt
    np.testing.assert_array_equal(sheet[-SIDE:, SIDE + gap : 2 * SIDE + gap], images[4])
    strip = read_image(six[1])
    assert strip.shape == (SIDE, 3 * SIDE + 2 * gap, 3)  # as many frames as there are steps, up to eight
    assert [flags["seed"] for flags in read_metadata(six[-1])] == list(range(5, 11))


def test_any_image_is_drawn_again_from_its_metadata(six, sample_cli):
    """The fifth of six alone: the same file, byte for byte."""
    flags = read_metadata(six[8])
    assert flags["prompt"] == "A red dragon"
    assert flags["seed"] == 9
    assert (flags["scheduler"], flags["height"], flags["width"]) == ("ddim", SIDE, SIDE)  # as they came out
    assert flags["batch_size"] == 3
    code, out, _ = sample_cli(*(f"--{name}={value}" for name, value in flags.items()), "--output=again.png")
    assert (code, out) == (0, ["again.png", "again-preview.png"])
    assert Path("again.png").read_bytes() == six[8].read_bytes()


@pytest.fixture
def told(monkeypatch):
    """The arguments of each batch; planes are drawn, as dark as their seed."""
    batches = []

    def resolved(model, settings, **arguments):
        batches.append(arguments)
        return resolve_images(model, settings, **arguments)

    def draw(model, params, request, lookup):
        seeds = np.asarray(jax.random.key_data(request.images.keys))[:, 1].astype(np.uint8)
        return Drawn(seeds[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8), np.ones(len(seeds), bool), None)

    monkeypatch.setattr(sample, "resolve_images", resolved)
    monkeypatch.setattr(sample, "draw", draw)
    return batches


def test_uneven_batches_are_filled_up(sample_cli, told):
    """Five images by three: the second batch has the first one's size, and nothing of its filling is written."""
    code, out, _ = sample_cli("--prompt=x", "--num_images=5", "--batch_size=3", "--output={seed}.png")
    assert (code, out) == (0, [f"{i}.png" for i in range(5)])
    assert [(len(b["prompts"]), b["seed"]) for b in told] == [(3, [0, 1, 2]), (3, [3, 4, 4])]
    assert [read_image(path)[0, 0, 0] for path in out] == [0, 1, 2, 3, 4]


def test_a_file_of_prompts_as_a_matrix_in_a_style_on_one_sheet(sample_cli, told):
    Path("p.txt").write_text("a {red|green} cat\na {big|small} dog\n")
    Path("s.json").write_text('{"blue": {"prompt": "{prompt} in blue", "negative_prompt": "red"}}')
    style = ("--style=blue", "--styles_file=s.json")
    code, out, _ = sample_cli("--prompts_file=p.txt", "--matrix", *style, "--num_images=3", "--grid", "--output=o")
    assert code == 0
    subjects = ["a-red-cat", "a-green-cat", "a-big-dog", "a-small-dog"]
    assert [Path(p).stem for p in out] == [f"{subjects[i // 3]}-in-blue-{i:03d}" for i in range(12)] + ["grid"]
    assert {n for b in told for n in b["negative_prompts"]} == {"red"}
    sheet = read_image(out[-1])
    assert sheet.shape == (4 * 6 - 2, 3 * 6 - 2, 3)  # one row a prompt
    assert sheet[::6, ::6, 0].tolist() == np.arange(12).reshape(4, 3).tolist()


def test_a_model_recommends_its_guidance_scale(sample_cli, told, tiny):
    model, params = tiny
    options = dataclasses.replace(model.options, guidance_scale=2.0)
    jaxdiff.save("recommends", dataclasses.replace(model, options=options), params)
    assert sample_cli(CASTLE, "--output=a.png", model="recommends")[0] == 0
    assert sample_cli(CASTLE, "--output=b.png", "--guidance_scale=3", model="recommends")[0] == 0
    assert sample_cli(CASTLE, "--output=c.png")[0] == 0
    assert [b["guidance_scale"] for b in told] == [[2.0], [3.0], [7.5]]
    assert read_metadata("a.png")["guidance_scale"] == 2.0  # for whoever draws it with another version of the model
    options = dataclasses.replace(options, steps=2)
    jaxdiff.save("recommends", dataclasses.replace(model, options=options), params)
    assert sample_cli(CASTLE, "--output=d.png", model="recommends")[0] == 0
    assert sample_cli(CASTLE, "--output=e.png", STEPS, model="recommends")[0] == 0
    assert [read_metadata(f"{name}.png")["steps"] for name in "cde"] == [25, 2, 3]
    Path("recommends/model_index.json").write_text('{"_steps": "few"}')
    assert "_steps 'few' in model_index.json must be a whole number" in sample_cli(CASTLE, model="recommends")[2]
    Path("recommends/model_index.json").write_text('{"_guidance_scale": "much"}')
    assert "_guidance_scale 'much' in model_index.json must be a number" in sample_cli(CASTLE, model="recommends")[2]
    assert load_model(find("icons")).options.guidance_scale == 5


def test_an_image_is_drawn_again_from_its_file(six, sample_cli):
    """As above, by one flag; flags given beside it win."""
    code, out, _ = sample_cli(f"--from_png={six[8]}", "--output=again.png")
    assert (code, out) == (0, ["again.png", "again-preview.png"])
    assert Path("again.png").read_bytes() == six[8].read_bytes()
    code, _, err = sample_cli("--from_png=out/grid.png")
    assert code == 2
    assert "--from_png out/grid.png is a sheet of several images" in err
    write_png("plain.png", np.zeros((4, 4, 3)))
    code, _, err = sample_cli("--from_png=plain.png")
    assert code == 2
    assert "--from_png: plain.png does not say how it was drawn" in err


def test_metadata_for_people(six):
    with Image.open(six[0]) as image:
        text = image.info["parameters"]
    assert text.startswith("a castle\nNegative prompt: blurry\nSeed: 5, ")
    assert "Guidance scale: 7.5" in text


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ([], "--prompt is missing"),
        ([CASTLE, "dragon"], "'dragon' belongs to no flag: put each prompt in quotes"),
        ([CASTLE, "--promt=a"], "Unknown command line flag 'promt'"),
        ([CASTLE, "--steps=0"], "--steps=0"),
        ([CASTLE, "--steps=many"], "--steps=many"),
        ([CASTLE, "--num_images=0"], "--num_images=0"),
        ([CASTLE, "--batch_size=0"], "--batch_size=0"),
        ([CASTLE, "--seed=-1"], "--seed=-1"),
        ([CASTLE, "--seed=4294967296"], "--seed=4294967296"),
        ([CASTLE, "--dtype=int8"], "float32|bfloat16|float16"),
        ([CASTLE, "--guidance_scale=nan"], "--guidance_scale nan"),
        ([CASTLE, "--height=-8"], "--height=-8"),
        ([CASTLE, "--strength=0.5"], "--strength goes with --image"),
        ([CASTLE, "--image=a.png", "--strength=0"], "--strength 0.0 must be in (0, 1]"),
        ([CASTLE, "--image=a.png", "--strength=-0.5"], "--strength=-0.5"),
        ([CASTLE, "--image=a.png", "--strength=1.01"], "--strength=1.01"),
        ([CASTLE, "--image=a.png", "--strength=nan"], "--strength nan"),
        (
            [CASTLE, "--image=a.png", "--strength=0.1", STEPS],
            "--strength 0.1 must be in (0, 1] and leave at least one of 3 steps",
        ),
        # These need the model's configuration.
        ([CASTLE, "--height=17"], "--height 17 must be a positive multiple of 2"),
        ([CASTLE, "--scheduler=eulr"], "--scheduler 'eulr' is unknown; known are "),
        ([CASTLE, "--spacing=even"], "--spacing 'even' is unknown; known are "),
        ([CASTLE, "--output=a.jpg"], "--output a.jpg"),
    ],
)
def test_flags_that_cannot_be_right(flags, sentence, sample_cli):
    code, out, err = sample_cli(*flags)
    assert (code, out) == (2, [])
    assert sentence in err
    assert err.startswith("sample.py: error: ")
    assert err.count("\n") == 1
    assert existing() == []


def test_missing_model(sample_cli):
    code, out, err = sample_cli(CASTLE, model="no/such/model")
    assert (code, out) == (2, [])
    assert err.startswith("sample.py: error: --model: no/such/model is neither a folder nor a bundled model")


def test_damaged_weights_leave_no_output(sample_cli, tiny_folder, tmp_path):
    for name in ("model_index.json", "unet/config.json", "vae/config.json", "text_encoder/config.json"):
        (tmp_path / "bad" / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / "bad" / name).write_bytes((tiny_folder / name).read_bytes())
    for name in ("tokenizer", "scheduler"):
        (tmp_path / "bad" / name).symlink_to(tiny_folder / name)
    for name in ("text_encoder/model", "unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model"):
        (tmp_path / f"bad/{name}.safetensors").write_bytes(b"\x08")
    code, out, err = sample_cli(CASTLE, "--output=out/castle.png", model=tmp_path / "bad")
    assert (code, out) == (2, [])
    assert "bad/text_encoder/model.safetensors is damaged or not a safetensors file" in err
    assert err.count("\n") == 1
    assert not Path("out").exists()


def test_outputs_that_cannot_be_written_are_found_before_drawing(sample_cli, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "draw", lambda *a, **k: pytest.fail("was drawing"))
    Path("file").touch()
    for output in ("file/castle.png", "file/deeper/castle.png", "file/{index}.png", "file/out/"):
        code, out, err = sample_cli(CASTLE, f"--output={output}")
        assert (code, out) == (1, [])
        assert "file is a file, not a folder" in err
    code, _, err = sample_cli(CASTLE, "--output=/proc/castle.png")
    assert code == 1
    assert "--output: " in err
    assert "/proc" in err
    assert existing() == ["file"]


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_folders_without_permission(sample_cli, tmp_path):
    (tmp_path / "shut").mkdir(mode=0o555)
    code, _, err = sample_cli(CASTLE, "--output=shut/castle.png")
    assert code == 1
    assert "shut is not writable" in err


def test_a_full_disk_leaves_no_half_image(sample_cli, monkeypatch):
    def full(self, file, **kwargs):
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    code, out, err = sample_cli(CASTLE, STEPS, "--output=castle.png")
    assert (code, out) == (1, [])
    assert "castle.png cannot be written (No space left on device)" in err
    assert existing() == []


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (KeyboardInterrupt(), 130, "stopped"),
        (
            RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating\n 9 bytes"),
            1,
            "Memory is too small: lower --batch_size",
        ),
        (FloatingPointError("1 of 1 images is no number."), 1, "error: 1 of 1 images is no number."),
        (RuntimeError("something\nodd"), 1, "RuntimeError: something odd; --verbose shows where."),
    ],
)
def test_what_goes_wrong_while_drawing_is_one_line(error, code, sentence, sample_cli, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(sample, "draw", fail)
    status, out, err = sample_cli(CASTLE, STEPS)
    assert (status, out) == (code, [])
    assert sentence in err
    assert err.count("\n") == 1


@pytest.mark.slow
def test_an_image_to_start_from_is_cut_and_resized(sample_cli):
    write_png("start.png", np.random.default_rng(0).random((20, 40, 3)))
    code, out, err = sample_cli(CASTLE, STEPS, "--image=start.png", "--strength=0.7", "--output=castle.png")
    assert (code, out) == (0, ["castle.png"])
    assert f"--image start.png is 40 x 20: cut at its centre and resized to {SIDE} x {SIDE}" in err
    flags = read_metadata("castle.png")
    assert (flags["image"], flags["strength"]) == ("start.png", 0.7)
    write_png("square.png", np.zeros((SIDE, SIDE, 3)))
    code, out, err = sample_cli(CASTLE, STEPS, "--image=square.png", "--strength=0.7", "--output=night.png")
    assert (code, out, err) == (0, ["night.png"], "")
    assert read_image("night.png").tolist() != read_image("castle.png").tolist()


def test_an_unreadable_image_is_named(sample_cli):
    Path("text.png").write_text("no picture")
    for name, sentence in (
        ("text.png", "--image: text.png cannot be read as an image"),
        ("none.png", "--image: none.png does not exist: check the path"),
    ):
        code, out, err = sample_cli(CASTLE, f"--image={name}")
        assert (code, out) == (2, [])
        assert sentence in err
        assert err.count("\n") == 1
    with pytest.raises(ImageError):
        read_metadata("text.png")


def process(*args, cwd):
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    env["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"  # whether a program is kept must not depend on the machine
    env.pop("JAX_COMPILATION_CACHE_DIR", None)
    return subprocess.run([sys.executable, ROOT / "sample.py", *args], cwd=cwd, env=env, capture_output=True, text=True)


@pytest.mark.slow
def test_as_a_process_in_a_pipe(tiny_folder, tmp_path):
    """Paths alone on stdout, the cut prompt on stderr, and the compiled program kept for the next run."""
    prompt = "a castle " * 100 + "and the end"
    flags = [
        f"--model={tiny_folder}",
        f"--prompt={prompt}",
        STEPS,
        "--output=castle.png",
        f"--cache_dir={tmp_path / 'c'}",
    ]
    done = process(*flags, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "castle.png\n")
    (warning,) = done.stderr.splitlines()
    assert warning.startswith("sample.py: WARNING: The prompt 'a castle a castle")
    assert "the text after the first 16 is left out: " in warning
    assert warning.endswith("and the end")
    assert any("program" in p.name for p in (tmp_path / "c").iterdir())


def test_help_names_every_flag(sample_cli, capsys):
    code, out, err = sample_cli("--help")
    assert (code, err) == (0, "")
    text = "\n".join(out)
    for name in ("--model", "--prompt", "--strength", "--batch_size", "--cache_dir"):
        assert f"  {name}:" in text
