"""python -m jaxdiff.evaluation: flags to a report, and one sentence for every mistake."""

import json
import re
import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import jaxdiff
from jaxdiff.cli.errors import Failure, UsageError
from jaxdiff.config import ConfigError
from jaxdiff.evaluation import command, outputs
from jaxdiff.evaluation.flags import define
from jaxdiff.evaluation.images import find_images
from jaxdiff.evaluation.report import table
from jaxdiff.io.images import read_image, write_png
from jaxdiff.text.prompt_files import PromptLine
from tests.support import evaluation_folders as folders
from tests.support.tiny import SIDE

PROMPTS = ["a castle", "a red dragon", "a (blue:1.2) house"]
DRAW = ("--prompts=prompts.txt", "--steps=2", "--num_images=2", "--batch_size=4")


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A folder with an encoder, data and features that are kept."""
    folder = tmp_path_factory.mktemp("given")
    folders.clip_model_folder(folder / "clip")
    folders.data_folder(folder / "data")
    return folder


@pytest.fixture
def cli(given, tiny_folder, tmp_path, monkeypatch, capsys, caplog):
    """Runs a command line in a folder with a file of prompts: (exit code, stdout, stderr with the warnings)."""
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("\n".join(PROMPTS))

    def run(*args, model=tiny_folder, encoder=given / "clip"):
        caplog.clear()
        own = [f"--{k}={v}" for k, v in (("model", model), ("encoder", encoder)) if v is not None]
        code = command.main(["evaluation", *own, *args])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return code, captured.out, captured.err + "\n".join(r.getMessage() for r in caplog.records)

    return run


def report(folder="report") -> dict:
    return json.loads(Path(folder, "report.json").read_text())["measures"]


def lines(folder="report") -> list[dict]:
    return [json.loads(line) for line in Path(folder, "images.jsonl").read_text().splitlines()]


def data_flags(given, *more) -> tuple[str, ...]:
    return (f"--data={given / 'data'}", "--held_out_split=test", "--group=subject", *more)


def test_draws_and_measures(cli, given):
    code, out, err = cli(*DRAW, "--num_images=8", *data_flags(given))
    assert (code, err) == (0, "")
    assert out == Path("report/report.md").read_text()
    assert sorted(p.name for p in Path().iterdir()) == ["prompts.txt", "report"]
    names = ["images", "images.jsonl", "images.png", "pairs-00.png", "report.json", "report.md"]
    assert sorted(p.name for p in Path("report").iterdir()) == names
    found = report()
    assert {part: list(rows) for part, rows in found.items()} == {
        "agreement": ["clip_score", "rank_1", "reciprocal_rank"],
        "distance": ["frechet", "frechet_limit", "kernel"],
        "variety": ["distance", "ratio"],
        "originality": ["features_ratio", "features_near_copies", "pixels_ratio", "pixels_near_copies"],
    }
    for row in (row for rows in found.values() for row in rows.values()):
        assert row["images"] == 24
        assert np.isfinite([row["value"], row["error"]]).all()
    assert read_image("report/images/000023.png").shape == (SIDE, SIDE, 3)
    each = lines()
    assert [e["seed"] for e in each] == list(range(24))
    assert found["agreement"]["clip_score"]["value"] == pytest.approx(np.mean([e["clip_score"] for e in each]))
    assert found["agreement"]["rank_1"]["value"] == np.mean([e["rank"] == 1 for e in each])
    assert found["variety"]["ratio"]["value"] == pytest.approx(
        found["variety"]["distance"]["value"] / found["variety"]["distance"]["real"]["value"]
    )


def test_seeds_draw_what_generate_draws(cli, tiny):
    """The same program, of batches of four."""
    code, _, err = cli(*DRAW, "--seed=5", "--guidance_scale=3")
    assert (code, err) == (0, "")
    prompts, seeds = [p for p in PROMPTS for _ in "ab"], np.arange(5, 9)
    drawn = jaxdiff.generate(*tiny, prompts[:4], seed=seeds, steps=2, guidance_scale=3.0)
    for i in range(4):
        np.testing.assert_array_equal(read_image(f"report/images/{i:06d}.png"), drawn[i])
    assert "variety" in report()
    assert "originality" not in report()


def test_flags_and_lines_reach_generate(cli, monkeypatch):
    calls = []

    def generate(model, params, prompts, negative, **options):
        calls.append((prompts, negative, options))
        return np.full((len(prompts), SIDE, SIDE, 3), len(calls), np.uint8)

    monkeypatch.setattr(jaxdiff, "generate", generate)
    lines = [{"prompt": "a castle"}, {"prompt": "a dragon", "negative_prompt": "red", "seed": 70}]
    Path("lines.jsonl").write_text("\n".join(map(json.dumps, lines)))
    flags = ("--scheduler=euler", "--spacing=karras", "--steps=3", "--height=18", "--width=20", "--guidance_scale=2")
    code, _, err = cli("--prompts=lines.jsonl", "--num_images=2", "--batch_size=3", "--negative_prompt=blurry", *flags)
    assert (code, err) == (0, "")
    (first, second) = calls
    assert first[:2] == (["a castle", "a castle", "a dragon"], ["blurry", "blurry", "red"])
    assert [c[2].pop("seed") for c in calls] == [[0, 1, 70], [71] * 3]
    options = {"scheduler": "euler", "spacing": "karras", "steps": 3, "height": 18, "width": 20, "guidance_scale": 2.0}
    assert first[2] == second[2] == options


def test_killed_it_goes_on(cli, monkeypatch):
    """Drawn images stay, and the report comes out the same; batches are filled up, so one program draws all."""
    assert cli(*DRAW, "--output=whole")[0] == 0
    generate, calls = jaxdiff.generate, []

    def killed(*args, **kwargs):
        calls.append(kwargs["seed"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(*args, **kwargs)

    monkeypatch.setattr(jaxdiff, "generate", killed)
    code, out, err = cli(*DRAW)
    assert (code, out) == (130, "")
    assert "the same command goes on where it was" in err
    assert not Path("report").exists()
    assert cli(*DRAW)[0] == 0
    assert [seed[0] for seed in calls] == [0, 4, 4]
    for name in [f"images/{i:06d}.png" for i in range(6)]:
        assert Path("report", name).read_bytes() == Path("whole", name).read_bytes()
    assert lines() == lines("whole")


def test_other_settings_begin_anew(cli, monkeypatch):
    generate = jaxdiff.generate
    monkeypatch.setattr(command, "measure", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    assert cli(*DRAW)[0] == 130
    calls = []
    monkeypatch.setattr(jaxdiff, "generate", lambda *a, **k: calls.append(k["seed"]) or generate(*a, **k))
    assert cli(*DRAW)[0] == 130
    assert calls == []
    assert cli(*DRAW, "--guidance_scale=2")[0] == 130
    assert [seed[0] for seed in calls] == [0, 4]


def test_drawn_images_measured_again_give_the_same(cli):
    assert cli(*DRAW)[0] == 0
    code, _, err = cli("--images=report/images", "--output=again", model=None)
    assert (code, err) == (0, "")
    assert report("again") == report()
    assert [e["file_name"] for e in lines("again")] == [f"{i:06d}.png" for i in range(6)]


def copies(given, count: int = 24) -> None:
    """A folder of training images as if they were drawn, each of its own caption."""
    shutil.copytree(given / "data/train", "drawn")
    path = Path("drawn/metadata.jsonl")
    path.write_text("\n".join(path.read_text().splitlines()[:count]))


def test_copies_of_training_images_are_found(cli, given):
    copies(given)
    code, _, err = cli("--images=drawn", *data_flags(given, "--pairs=30"), model=None)
    assert (code, err) == (0, "")
    found = report()["originality"]
    for kind in ("features", "pixels"):
        assert found[f"{kind}_near_copies"]["value"] == 1
        assert found[f"{kind}_near_copies"]["real"]["value"] < 0.5
        assert found[f"{kind}_ratio"]["real"]["value"] == 1
    for i, line in enumerate(lines()):
        near = line["nearest"]["pixels"]
        assert near["ratio"] == 0
        assert near["name"] == str(given / f"data/train/{i:03d}.png")
    sheet = read_image("report/pairs-00.png")
    labels, left, right = (sheet[:14, :256], sheet[14:142, :128], sheet[14:142, 128:256])
    np.testing.assert_array_equal(left, right)  # the drawn image and the same one of the training data
    assert labels.min() < 100


def test_real_images_against_real_ones(cli, given, tmp_path):
    """Distances are zero within their errors, and new images are as new as held-out ones."""
    rng = np.random.default_rng(9)
    subjects = [list(folders.COLOURS)[i % 4] for i in range(48)]
    folders.write_split(tmp_path / "new", [folders.image(s, rng) for s in subjects], subjects)
    code, _, err = cli("--images=new", *data_flags(given), model=None)
    assert (code, err) == (0, "")
    found = report()
    for name in ("frechet_limit", "kernel"):
        row = found["distance"][name]
        assert abs(row["value"]) < 4 * row["error"]
    assert found["variety"]["ratio"]["value"] == pytest.approx(1, abs=4 * found["variety"]["ratio"]["error"])
    assert 0.4 < found["originality"]["features_ratio"]["value"] < 2.5


def test_one_image_whatever_the_seed_has_no_variety(cli, given):
    Path("drawn").mkdir()
    for i in range(4):
        Image.new("RGB", (16, 16), (255, 0, 0) if i < 2 else (0, 0, 255)).save(f"drawn/{i}.png")
    Path("prompts.txt").write_text("a castle\na red dragon")
    code, _, _ = cli("--images=drawn", "--prompts=prompts.txt", f"--data={given / 'data'}", model=None)
    assert code == 0
    assert report()["variety"]["distance"]["value"] == pytest.approx(0, abs=1e-6)
    assert [e["prompt"] for e in lines()] == ["a castle"] * 2 + ["a red dragon"] * 2
    text = Path("report/report.md").read_text()
    assert "give --held_out_split" in text
    assert "need at least 24 images" in text


def test_images_of_sample_bring_their_prompts(cli):
    for i, prompt in enumerate(PROMPTS):
        Path("drawn").mkdir(exist_ok=True)
        write_png(f"drawn/{i}.png", np.full((16, 16, 3), 80 * i, np.uint8), {"prompt": prompt})
    assert cli("--images=drawn", model=None)[0] == 0
    assert [e["prompt"] for e in lines()] == PROMPTS


def test_the_models_own_encoder(cli, given, tmp_path):
    copies(given, 4)
    assert cli("--images=drawn", "--output=one", model=None)[0] == 0
    code, _, err = cli("--images=drawn", "--output=two", encoder=None, model=folders.parts_folder(tmp_path / "model"))
    assert (code, err) == (0, "")
    settings = json.loads(Path("two/report.json").read_text())["settings"]
    assert settings == {"jaxdiff": jaxdiff.__version__, "images": "drawn", "model": str(tmp_path / "model"),
                        "encode_batch_size": 64}  # fmt: skip
    scores = [[e["clip_score"] for e in lines(folder)] for folder in ("one", "two")]
    np.testing.assert_allclose(scores[1], scores[0], atol=2e-5)  # see test_evaluation_encoder.py


def test_an_existing_report_stays_unless_it_is_to_be_replaced(cli):
    assert cli(*DRAW, "--output=new/report")[0] == 0
    before = Path("new/report/report.json").read_bytes()
    code, out, err = cli(*DRAW, "--output=new/report", "--seed=3")
    assert (code, out) == (2, "")
    assert "--output new/report exists: name another folder, or give --overwrite" in err
    assert Path("new/report/report.json").read_bytes() == before
    assert cli(*DRAW, "--output=new/report", "--seed=3", "--overwrite")[0] == 0
    assert Path("new/report/report.json").read_bytes() != before
    assert [p.name for p in Path("new").iterdir()] == ["report"]
    Path("mine").mkdir()
    Path("mine/file").write_text("")
    assert "is no report" in cli(*DRAW, "--output=mine", "--overwrite")[2]
    assert Path("mine/file").exists()


def test_a_report_is_not_made_over_what_it_reads(cli, given):
    """Neither the folder that it replaces nor the unfinished one, which would be emptied."""
    for folder in ("report/images", ".report.partial/images"):
        shutil.copytree(given / "data/train", folder)
    Path("report/report.json").write_text("{}")
    for flags in (
        ["--images=report/images"],
        ["--images=.report.partial/images"],
        ["--images=.", "--data=report/images"],
        ["--images=.", f"--data={given / 'data'}", "--features=report/features"],
    ):
        code, _, err = cli(*flags, "--overwrite", model=None)
        assert code == 2
        assert f"{flags[-1].replace('=', ' ')} lies where the report of --output report is made" in err
    assert Path("report/images/000.png").exists()
    assert Path(".report.partial/images/000.png").exists()


def test_a_full_disk_is_one_sentence_that_names_the_flag():
    with (
        pytest.raises(Failure, match=r"--output: there cannot be written \(No space left on device\): make room"),
        outputs.writing(Path("there")),
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


def test_seeds_of_a_prompts_file_and_repeats_of_an_image(tmp_path):
    """A line's seed is that of its first image, and an image that the metadata repeats is one image."""
    for i in range(4):
        blank(str(tmp_path / f"{i}.png"))
    assert find_images(tmp_path, [PromptLine("a", seed=7), PromptLine("b")]).seeds == (7, 8, None, None)
    given = [{"file_name": "0.png", "text": "a", "repeats": 3}, {"file_name": "1.png", "text": "b", "seed": 2}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, given)))
    found = find_images(tmp_path, None)
    assert (found.prompts, found.seeds) == (("a", "b"), (None, 2))


def test_an_image_whose_metadata_cannot_be_unpacked(tmp_path):
    bomb = PngInfo()
    bomb.add_text("jaxdiff", "x" * 2**21, zip=True)
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png", pnginfo=bomb)
    with pytest.raises(ConfigError, match=r"a\.png has no prompt: give --prompts"):
        find_images(tmp_path, None)


def test_names_that_are_not_unicode_can_be_reported():
    assert "images?" in table([], [], ["from images\udcff"])


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
        (["--prompts=prompts.txt", "--data=DATA", "--held_out_split=train"], "is --split too"),
        (["--images=.", "--steps=3"], "--steps is for drawing"),
        (["--images=."], "--model is for drawing"),
        (["--prompts=prompts.txt", "--data=DATA", "--group=style"], "--group style: no row"),
    ],
)  # fmt: skip
def test_flags_that_cannot_be_right(cli, given, args, sentence):
    code, out, err = cli(*[a.replace("DATA", str(given / "data")) for a in args])
    assert (code, out) == (2, "")
    assert re.search(sentence, err), err
    assert err.count("\n") == 1
    assert [p.name for p in Path().iterdir()] == ["prompts.txt"]


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: None, "--images drawn is no folder"),
        (lambda: Path("drawn").mkdir(), "--images drawn holds no images"),
        (lambda: blank("drawn/a.png"), "drawn/a.png has no prompt: give --prompts"),
    ],
)
def test_folders_without_images(cli, make, sentence):
    make()
    code, _, err = cli("--images=drawn", model=None)
    assert code == 2
    assert sentence in err


def blank(path: str) -> None:
    Path(path).parent.mkdir(exist_ok=True)
    Image.new("RGB", (16, 16)).save(path)


def test_numbers_of_images_and_prompts_that_do_not_fit(cli):
    for i in range(4):
        blank(f"drawn/{i}.png")
    code, _, err = cli("--images=drawn", "--prompts=prompts.txt", model=None)
    assert code == 2
    assert "holds 4 images, and --prompts 3 prompts" in err


def test_prompts_of_two_kinds(cli, given):
    copies(given, 2)
    code, _, err = cli("--images=drawn", "--prompts=prompts.txt", model=None)
    assert code == 2
    assert "leave --prompts out" in err


def test_a_damaged_image_is_named(cli, given):
    copies(given, 3)
    Path("drawn/001.png").write_bytes(Path("drawn/001.png").read_bytes()[:40])
    code, out, err = cli("--images=drawn", model=None)
    assert (code, out) == (1, "")
    assert "drawn/001.png cannot be read" in err
    assert "mend the file, or take it out" in err
    assert not Path("report").exists()


def test_no_encoder(cli, tiny_folder, tmp_path):
    code, _, err = cli(*DRAW, encoder=None)
    assert code == 2
    assert f"--encoder is missing: {tiny_folder} has no vision encoder of its own; give a folder of a CLIP model" in err
    code, _, err = cli(*DRAW, encoder=tmp_path)
    assert code == 1
    assert "--encoder: " in err
    assert "holds no vision encoder" in err


def test_training_images_that_cannot_be_read_are_counted(cli, given, tmp_path):
    data = shutil.copytree(given / "data", tmp_path / "data")
    (data / "train/005.png").write_bytes(b"")
    copies(given, 2)
    code, out, err = cli("--images=drawn", f"--data={data}", model=None)
    assert code == 0
    assert "005.png cannot be read" in err
    assert "1 of the 48 training images" in out


def test_an_output_that_cannot_be_written(cli):
    Path("file").write_text("")
    code, _, err = cli(*DRAW, "--output=file/report")
    assert code == 1
    assert "--output" in err


def test_help(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["evaluation", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("jaxdiff.evaluation", run_name="__main__")
    assert ended.value.code == 0
    assert "--held_out_split" in capsys.readouterr().out
