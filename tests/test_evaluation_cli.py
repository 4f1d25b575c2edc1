"""python -m jaxdiff.evaluation: flags to a report, and one sentence for every mistake."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import jaxdiff
from jaxdiff.evaluation import command
from jaxdiff.evaluation.images import find_images
from jaxdiff.evaluation.report import table
from jaxdiff.io.images import read_image, write_png
from jaxdiff.text.prompt_files import PromptLine
from tests.support import evaluation_folders as folders
from tests.support.tiny import SIDE


def report(folder="report") -> dict:
    return json.loads(Path(folder, "report.json").read_text())["measures"]


def lines(folder="report") -> list[dict]:
    return [json.loads(line) for line in Path(folder, "images.jsonl").read_text().splitlines()]


def data_flags(folder, *more) -> tuple[str, ...]:
    return (f"--data={folder / 'data'}", "--held_out_split=test", "--group=subject", *more)


def test_draws_and_measures(evaluation_cli, clip_and_data):
    code, out, err = evaluation_cli(*folders.DRAW, "--num_images=8", *data_flags(clip_and_data))
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


def test_seeds_draw_what_generate_draws(evaluation_cli, tiny):
    """The same program, of batches of four."""
    code, _, err = evaluation_cli(*folders.DRAW, "--seed=5", "--guidance_scale=3")
    assert (code, err) == (0, "")
    prompts, seeds = [p for p in folders.PROMPTS for _ in "ab"], np.arange(5, 9)
    drawn = jaxdiff.generate(*tiny, prompts[:4], seed=seeds, steps=2, guidance_scale=3.0)
    for i in range(4):
        np.testing.assert_array_equal(read_image(f"report/images/{i:06d}.png"), drawn[i])
    assert "variety" in report()
    assert "originality" not in report()


def test_flags_and_lines_reach_generate(evaluation_cli, monkeypatch):
    calls = []

    def generate(model, params, prompts, negative, **options):
        calls.append((prompts, negative, options))
        return np.full((len(prompts), SIDE, SIDE, 3), len(calls), np.uint8)

    monkeypatch.setattr(jaxdiff, "generate", generate)
    lines = [{"prompt": "a castle"}, {"prompt": "a dragon", "negative_prompt": "red", "seed": 70}]
    Path("lines.jsonl").write_text("\n".join(map(json.dumps, lines)))
    flags = ("--scheduler=euler", "--spacing=karras", "--steps=3", "--height=18", "--width=20", "--guidance_scale=2")
    code, _, err = evaluation_cli(
        "--prompts=lines.jsonl",
        "--num_images=2",
        "--batch_size=3",
        "--negative_prompt=blurry",
        "--pag_scale=1.5",
        *flags,
    )
    assert (code, err) == (0, "")
    (first, second) = calls
    assert first[:2] == (["a castle", "a castle", "a dragon"], ["blurry", "blurry", "red"])
    assert [c[2].pop("seed") for c in calls] == [[0, 1, 70], [71] * 3]
    options = {"scheduler": "euler", "spacing": "karras", "steps": 3, "height": 18, "width": 20}
    options |= {"guidance_scale": 2.0, "pag_scale": 1.5}
    assert first[2] == second[2] == options


def test_killed_it_goes_on(evaluation_cli, monkeypatch):
    """Drawn images stay, and the report comes out the same; batches are filled up, so one program draws all."""
    assert evaluation_cli(*folders.DRAW, "--output=whole")[0] == 0
    generate, calls = jaxdiff.generate, []

    def killed(*args, **kwargs):
        calls.append(kwargs["seed"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(*args, **kwargs)

    monkeypatch.setattr(jaxdiff, "generate", killed)
    code, out, err = evaluation_cli(*folders.DRAW)
    assert (code, out) == (130, "")
    assert "the same command goes on where it was" in err
    assert not Path("report").exists()
    assert evaluation_cli(*folders.DRAW)[0] == 0
    assert [seed[0] for seed in calls] == [0, 4, 4]
    for name in [f"images/{i:06d}.png" for i in range(6)]:
        assert Path("report", name).read_bytes() == Path("whole", name).read_bytes()
    assert lines() == lines("whole")


def test_other_settings_begin_anew(evaluation_cli, monkeypatch):
    generate = jaxdiff.generate
    monkeypatch.setattr(command, "measure", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    assert evaluation_cli(*folders.DRAW)[0] == 130
    calls = []
    monkeypatch.setattr(jaxdiff, "generate", lambda *a, **k: calls.append(k["seed"]) or generate(*a, **k))
    assert evaluation_cli(*folders.DRAW)[0] == 130
    assert calls == []
    assert evaluation_cli(*folders.DRAW, "--guidance_scale=2")[0] == 130
    assert [seed[0] for seed in calls] == [0, 4]


def test_drawn_images_measured_again_give_the_same(evaluation_cli):
    assert evaluation_cli(*folders.DRAW)[0] == 0
    code, _, err = evaluation_cli("--images=report/images", "--output=again", model=None)
    assert (code, err) == (0, "")
    assert report("again") == report()
    assert [e["file_name"] for e in lines("again")] == [f"{i:06d}.png" for i in range(6)]


def test_copies_of_training_images_are_found(evaluation_cli, clip_and_data):
    folders.copies(clip_and_data)
    code, _, err = evaluation_cli("--images=drawn", *data_flags(clip_and_data, "--pairs=30"), model=None)
    assert (code, err) == (0, "")
    found = report()["originality"]
    for kind in ("features", "pixels"):
        assert found[f"{kind}_near_copies"]["value"] == 1
        assert found[f"{kind}_near_copies"]["real"]["value"] < 0.5
        assert found[f"{kind}_ratio"]["real"]["value"] == 1
    for i, line in enumerate(lines()):
        near = line["nearest"]["pixels"]
        assert near["ratio"] == 0
        assert near["name"] == str(clip_and_data / f"data/train/{i:03d}.png")
    sheet = read_image("report/pairs-00.png")
    labels, left, right = (sheet[:14, :256], sheet[14:142, :128], sheet[14:142, 128:256])
    np.testing.assert_array_equal(left, right)  # the drawn image and the same one of the training data
    assert labels.min() < 100


def test_real_images_against_real_ones(evaluation_cli, clip_and_data, tmp_path):
    """Distances are zero within their errors, and new images are as new as held-out ones."""
    rng = np.random.default_rng(9)
    subjects = [list(folders.COLOURS)[i % 4] for i in range(48)]
    folders.write_split(tmp_path / "new", [folders.image(s, rng) for s in subjects], subjects)
    code, _, err = evaluation_cli("--images=new", *data_flags(clip_and_data), model=None)
    assert (code, err) == (0, "")
    found = report()
    for name in ("frechet_limit", "kernel"):
        row = found["distance"][name]
        assert abs(row["value"]) < 4 * row["error"]
    assert found["variety"]["ratio"]["value"] == pytest.approx(1, abs=4 * found["variety"]["ratio"]["error"])
    assert 0.4 < found["originality"]["features_ratio"]["value"] < 2.5


def test_one_image_whatever_the_seed_has_no_variety(evaluation_cli, clip_and_data):
    Path("drawn").mkdir()
    for i in range(4):
        Image.new("RGB", (16, 16), (255, 0, 0) if i < 2 else (0, 0, 255)).save(f"drawn/{i}.png")
    Path("prompts.txt").write_text("a castle\na red dragon")
    code, _, _ = evaluation_cli(
        "--images=drawn", "--prompts=prompts.txt", f"--data={clip_and_data / 'data'}", model=None
    )
    assert code == 0
    assert report()["variety"]["distance"]["value"] == pytest.approx(0, abs=1e-6)
    assert [e["prompt"] for e in lines()] == ["a castle"] * 2 + ["a red dragon"] * 2
    text = Path("report/report.md").read_text()
    assert "give --held_out_split" in text
    assert "need at least 24 images" in text


def test_images_of_sample_bring_their_prompts(evaluation_cli):
    for i, prompt in enumerate(folders.PROMPTS):
        Path("drawn").mkdir(exist_ok=True)
        write_png(f"drawn/{i}.png", np.full((16, 16, 3), 80 * i, np.uint8), {"prompt": prompt})
    assert evaluation_cli("--images=drawn", model=None)[0] == 0
    assert [e["prompt"] for e in lines()] == folders.PROMPTS


def test_the_models_own_encoder(evaluation_cli, clip_and_data, tmp_path):
    folders.copies(clip_and_data, 4)
    assert evaluation_cli("--images=drawn", "--output=one", model=None)[0] == 0
    code, _, err = evaluation_cli(
        "--images=drawn", "--output=two", encoder=None, model=folders.parts_folder(tmp_path / "model")
    )
    assert (code, err) == (0, "")
    settings = json.loads(Path("two/report.json").read_text())["settings"]
    assert settings == {"jaxdiff": jaxdiff.__version__, "images": "drawn", "model": str(tmp_path / "model"),
                        "encode_batch_size": 64}  # fmt: skip
    scores = [[e["clip_score"] for e in lines(folder)] for folder in ("one", "two")]
    np.testing.assert_allclose(scores[1], scores[0], atol=2e-5)  # see test_evaluation_encoder.py


def test_an_existing_report_stays_unless_it_is_to_be_replaced(evaluation_cli):
    assert evaluation_cli(*folders.DRAW, "--output=new/report")[0] == 0
    before = Path("new/report/report.json").read_bytes()
    code, out, err = evaluation_cli(*folders.DRAW, "--output=new/report", "--seed=3")
    assert (code, out) == (2, "")
    assert "--output new/report exists: name another folder, or give --overwrite" in err
    assert Path("new/report/report.json").read_bytes() == before
    assert evaluation_cli(*folders.DRAW, "--output=new/report", "--seed=3", "--overwrite")[0] == 0
    assert Path("new/report/report.json").read_bytes() != before
    assert [p.name for p in Path("new").iterdir()] == ["report"]
    Path("mine").mkdir()
    Path("mine/file").write_text("")
    assert "is not a report" in evaluation_cli(*folders.DRAW, "--output=mine", "--overwrite")[2]
    assert Path("mine/file").exists()


def test_seeds_of_a_prompts_file_and_repeats_of_an_image(tmp_path):
    """A line's seed is that of its first image, and an image that the metadata repeats is one image."""
    for i in range(4):
        folders.blank(str(tmp_path / f"{i}.png"))
    assert find_images(tmp_path, [PromptLine("a", seed=7), PromptLine("b")]).seeds == (7, 8, None, None)
    given = [{"file_name": "0.png", "text": "a", "repeats": 3}, {"file_name": "1.png", "text": "b", "seed": 2}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, given)))
    found = find_images(tmp_path, None)
    assert (found.prompts, found.seeds) == (("a", "b"), (None, 2))


def test_names_that_are_not_unicode_can_be_reported():
    assert "images?" in table([], [], ["from images\udcff"])


def test_training_images_that_cannot_be_read_are_counted(evaluation_cli, clip_and_data, tmp_path):
    data = shutil.copytree(clip_and_data / "data", tmp_path / "data")
    (data / "train/005.png").write_bytes(b"")
    folders.copies(clip_and_data, 2)
    code, out, err = evaluation_cli("--images=drawn", f"--data={data}", model=None)
    assert code == 0
    assert "005.png cannot be read" in err
    assert "1 of the 48 training images" in out


def test_help(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["evaluation", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("jaxdiff.evaluation", run_name="__main__")
    assert ended.value.code == 0
    assert "--held_out_split" in capsys.readouterr().out
