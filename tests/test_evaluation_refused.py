"""python -m jaxdiff.evaluation: one sentence for every mistake, and nothing lost by it."""

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from jaxdiff.cli.errors import Failure, UsageError
from jaxdiff.config import ConfigError
from jaxdiff.evaluation import command, outputs
from jaxdiff.evaluation.flags import define
from jaxdiff.evaluation.images import find_images
from tests.support import evaluation_folders as folders


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ([], "--prompts is missing"),
        (["--prompts=no.txt"], "--prompts: The prompts file no.txt does not exist"),
        (["--prompts=prompts.txt", "--num_image=3"], "Unknown command line flag 'num_image'"),
        (["--prompts=prompts.txt", "extra"], "'extra' belongs to no flag"),
        (["--prompts=prompts.txt", "--group=subject"], "--group goes with --data"),
        (["--prompts=prompts.txt", "--scheduler=none"], "--scheduler 'none' is unknown"),
        (["--prompts=prompts.txt", "--height=7"], "--height"),
        (["--prompts=prompts.txt", "--guidance_scale=nan"], "must be finite"),
        (["--prompts=prompts.txt", "--data=nowhere"], "--data, --split: The data folder nowhere does not exist"),
        (["--prompts=prompts.txt", "--data=DATA", "--held_out_split=no"], "--held_out_split: .* no no/metadata.jsonl"),
        (["--prompts=prompts.txt", "--data=DATA", "--held_out_split=train"], "is also --split"),
        (["--images=.", "--steps=3"], "--steps is for drawing"),
        (["--images=."], "--model is for drawing"),
        (["--prompts=prompts.txt", "--data=DATA", "--group=style"], "--group style: no row"),
    ],
)  # fmt: skip
def test_flags_that_cannot_be_right(evaluation_cli, clip_and_data, args, sentence):
    code, out, err = evaluation_cli(*[a.replace("DATA", str(clip_and_data / "data")) for a in args])
    assert (code, out) == (2, "")
    assert re.search(sentence, err), err
    assert err.count("\n") == 1
    assert [p.name for p in Path().iterdir()] == ["prompts.txt"]


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: None, "--images drawn is not a folder"),
        (lambda: Path("drawn").mkdir(), "--images drawn holds no images"),
        (lambda: folders.blank("drawn/a.png"), "drawn/a.png has no prompt: give --prompts"),
    ],
)
def test_folders_without_images(evaluation_cli, make, sentence):
    make()
    code, _, err = evaluation_cli("--images=drawn", model=None)
    assert code == 2
    assert sentence in err


def test_numbers_of_images_and_prompts_that_do_not_fit(evaluation_cli):
    for i in range(4):
        folders.blank(f"drawn/{i}.png")
    code, _, err = evaluation_cli("--images=drawn", "--prompts=prompts.txt", model=None)
    assert code == 2
    assert "holds 4 images, and --prompts 3 prompts" in err


def test_prompts_of_two_kinds(evaluation_cli, clip_and_data):
    folders.copies(clip_and_data, 2)
    code, _, err = evaluation_cli("--images=drawn", "--prompts=prompts.txt", model=None)
    assert code == 2
    assert "leave --prompts out" in err


def test_a_damaged_image_is_named(evaluation_cli, clip_and_data):
    folders.copies(clip_and_data, 3)
    Path("drawn/001.png").write_bytes(Path("drawn/001.png").read_bytes()[:40])
    code, out, err = evaluation_cli("--images=drawn", model=None)
    assert (code, out) == (1, "")
    assert "drawn/001.png cannot be read" in err
    assert "repair the file, or remove it" in err
    assert not Path("report").exists()


def test_no_encoder(evaluation_cli, tiny_folder, tmp_path):
    code, _, err = evaluation_cli(*folders.DRAW, encoder=None)
    assert code == 2
    assert f"--encoder is missing: {tiny_folder} has no vision encoder of its own; give a folder of a CLIP model" in err
    code, _, err = evaluation_cli(*folders.DRAW, encoder=tmp_path)
    assert code == 1
    assert "--encoder: " in err
    assert "holds no vision encoder" in err


def test_an_output_that_cannot_be_written(evaluation_cli):
    Path("file").write_text("")
    code, _, err = evaluation_cli(*folders.DRAW, "--output=file/report")
    assert code == 1
    assert "--output" in err


def test_a_report_is_not_made_over_what_it_reads(evaluation_cli, clip_and_data):
    """Neither the folder that it replaces nor the unfinished one, which would be emptied."""
    for folder in ("report/images", ".report.partial/images"):
        shutil.copytree(clip_and_data / "data/train", folder)
    Path("report/report.json").write_text("{}")
    for flags in (
        ["--images=report/images"],
        ["--images=.report.partial/images"],
        ["--images=.", "--data=report/images"],
        ["--images=.", f"--data={clip_and_data / 'data'}", "--features=report/features"],
    ):
        code, _, err = evaluation_cli(*flags, "--overwrite", model=None)
        assert code == 2
        assert f"{flags[-1].replace('=', ' ')} lies where the report of --output report is made" in err
    assert Path("report/images/000.png").exists()
    assert Path(".report.partial/images/000.png").exists()


def test_a_full_disk_is_one_sentence_that_names_the_flag():
    with (
        pytest.raises(Failure, match=r"--output: there cannot be written \(No space left on device\): free some space"),
        outputs.writing_report(Path("there")),
    ):
        raise OSError(28, "No space left on device")


def test_an_earlier_report_stays_where_the_new_one_cannot_be_published(tmp_path):
    (tmp_path / "report").mkdir()
    (tmp_path / "report/report.json").write_text("earlier")
    with pytest.raises(Failure, match="report cannot be written"):
        outputs.publish(tmp_path / "missing", tmp_path / "report", overwrite=True)
    assert (tmp_path / "report/report.json").read_text() == "earlier"


def test_models_that_draw_from_an_image_are_refused():
    f = define()
    f(["evaluation", "--model=upscaler"])
    with pytest.raises(UsageError, match="--model upscaler draws from an image"):
        command.drawing_options(f, SimpleNamespace(inpaints=False, family="upscaler"))


def test_an_image_whose_metadata_cannot_be_unpacked(tmp_path):
    bomb = PngInfo()
    bomb.add_text("jaxdiff", "x" * 2**21, zip=True)
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png", pnginfo=bomb)
    with pytest.raises(ConfigError, match=r"a\.png has no prompt: give --prompts"):
        find_images(tmp_path, None)
