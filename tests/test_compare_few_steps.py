"""The page that lays models of few and many steps side by side, on tiny models."""

import json

import numpy as np
import pytest
from PIL import Image

import jaxdiff
from benchmarks import compare_few_steps as compare
from tests.support.tiny import SIDE


@pytest.mark.slow
def test_a_page_has_a_row_and_the_grid_a_column_for_each(tiny_folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "prompts.txt").write_text("a castle\na house\na red dragon\n")
    given = ["--entry", f"few={tiny_folder}@1,2", "--entry", f"own={tiny_folder}@3", "--output", str(tmp_path / "o"),
                 "--prompts", str(tmp_path / "prompts.txt"), "--count=2", "--batch_size=3"]  # fmt: skip
    compare.main(given)
    page = (tmp_path / "o" / "few_steps.md").read_text()
    assert "4 images of 2 prompts by each" in page
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("| ")]
    assert rows[0] == ["model", "steps", "seconds an image", "CPU seconds"]
    assert [row[:2] for row in rows[1:]] == [["few", "1"], ["few", "2"], ["own", "3"]]
    with Image.open(tmp_path / "o" / "few_steps.webp") as sheet:
        assert sheet.size == (3 * (SIDE + compare.GAP) + compare.GAP, compare.LABEL + compare.GAP + 2 * (SIDE + 18))
    drawn = np.asarray(Image.open(tmp_path / "o" / "few-2-steps" / "images" / "0002.png")).astype(int)
    model, params = jaxdiff.load(tiny_folder)
    assert np.abs(drawn - jaxdiff.generate(model, params, "a house", seed=2, steps=2)[0]).max() <= 1
    monkeypatch.setattr(compare, "draw", lambda *_: pytest.fail("drawn again"))
    compare.main(given)
    assert page == capsys.readouterr().out[-len(page) :]


def test_measures_are_shown_with_their_errors():
    row = {"name": "gan", "steps": None, "seconds": {"wall": 0.5, "cpu": 1.0}}
    columns = [row | {"measures": {"variety": {"value": 0.7512, "error": 0.0123}}}, row | {"measures": {}}]
    report = {"images": 2, "prompts": 1, "batch_size": 4, "columns": columns}
    lines = compare.markdown(report, "a.webp").splitlines()
    assert "| gan | 1 | 0.5 | 1 | 0.751 ± 0.012 |" in lines
    assert "| gan | 1 | 0.5 | 1 | – |" in lines


def test_the_evaluations_rows_are_those_that_it_writes(tmp_path):
    """Their names, so that a column does not silently stay empty."""
    from jaxdiff.evaluation import measures
    from jaxdiff.evaluation.measures import EncodedImages

    rng = np.random.default_rng(0)
    some = EncodedImages(rng.normal(size=(64, 6)), rng.integers(0, 9, (64, 12), np.uint8), rng.normal(size=(32, 6)),
                    np.arange(64) // 2)  # fmt: skip
    rows = measures.agreement(some, None)[0] + measures.varieties(some, None, [], "")[0]
    found = {(row.part, row.name) for row in rows}
    assert {key for key in compare.SHOWN if key[0] in ("agreement", "variety")} <= found
    (tmp_path / "report.json").write_text(json.dumps({"measures": {"variety": {"distance": {"value": 1.0}}}}))
    assert compare.evaluate(tmp_path, tmp_path, "none", None, None) == {"variety": {"value": 1.0}}


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--entry=icons"], "must be name=model"),
        (["--entry=a=icons@x"], "must be name=model"),
        (["--entry=a=icons@1", "--entry=a=other@1"], "two columns have the same name"),
        (["--entry=a=icons", "--judge"], "--judge needs --data"),
        (["--entry=a=icons", "--data=x"], "--data goes with --encoder or --judge"),
    ],
)
def test_what_cannot_be_compared_is_said(args, said, capsys):
    with pytest.raises(SystemExit):
        compare.arguments([*args, "--output=o"])
    assert said in capsys.readouterr().err
