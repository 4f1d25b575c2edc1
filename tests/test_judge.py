"""The arithmetic of the benchmark that judges what the bundled model draws, and its list of prompts."""

import numpy as np
import pytest

from benchmarks.judge_measures import (
    Probe,
    border_color,
    color_histogram,
    confusion,
    fit_space,
    nearest_color,
    ranks,
    scores,
    share,
    shuffled,
    spread,
)
from benchmarks.judge_prompts import KINDS, SEEDS, requests, subjects
from datasets.icons.splits import split_of
from jaxdiff.evaluation.distances import unit

COLORS = {"red": (220, 30, 30), "blue": (30, 90, 220), "white": (255, 255, 255)}


def test_an_image_ranks_first_where_it_is_most_like_the_drawings():
    designs = np.array([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [-0.6, 0.8]])
    subjects = np.array(["cat", "cat", "dog", "dog"])
    table, names = scores(np.array([[1.0, 0.0], [0.0, 1.0]]), designs, subjects)
    np.testing.assert_allclose(table, [[0.9, -0.3], [0.3, 0.9]])
    assert ranks(table, names, [{"cat"}, {"cat"}]).tolist() == [1, 2]
    assert ranks(table, names, [{"dog"}, {"cat", "dog"}]).tolist() == [2, 1]


def test_the_space_brings_designs_of_one_subject_together():
    rng = np.random.default_rng(0)
    subjects = np.repeat([f"s{i}" for i in range(20)], 3)
    # In one direction designers differ by more than subjects do.
    features = np.repeat(rng.normal(0, 1, (20, 16)), 3, 0) + rng.normal(0, 1, (60, 16)) * [10, *[0.5] * 15]
    space = fit_space(features, subjects)
    assert np.allclose(np.linalg.norm(space(features), axis=1), 1)

    def right(x):
        table, names = scores(x, x, subjects)
        return np.mean(ranks(table, names, [{s} for s in subjects]) == 1)

    assert right(space(features)) > right(unit(features)) + 0.1


def test_the_error_of_a_share_counts_prompts_and_not_images():
    hits = np.repeat([1, 0] * 10, 5)
    alone = share(hits, [str(i) for i in range(100)])
    together = share(hits, [str(i // 5) for i in range(100)])
    assert alone["mean"] == together["mean"] == 0.5
    assert alone["error"] == pytest.approx(np.sqrt(0.25 / 100), rel=0.1)
    assert together["error"] == pytest.approx(np.sqrt(0.25 / 20), rel=0.1)


def test_confusion_counts_every_image_once():
    table = confusion(["red", "red", "blue"], ["red", "blue", "blue"])
    assert table == {"blue": {"blue": 1}, "red": {"blue": 1, "red": 1}}
    assert sum(sum(row.values()) for row in table.values()) == 3


def test_images_that_are_the_same_have_no_spread():
    assert spread(np.ones((4, 3))) == 0
    assert spread(np.eye(3)) == pytest.approx(np.sqrt(2))


def test_shuffled_keeps_the_items():
    assert sorted(shuffled(list("abcdef"))) == list("abcdef")
    assert shuffled(list("abcdef")) != list("abcdef")


def test_the_border_says_the_background_and_the_rest_the_color():
    image = np.full((64, 64, 3), COLORS["blue"], np.uint8)
    image[16:48, 16:48] = COLORS["red"]
    assert nearest_color(border_color(image), COLORS) == "blue"
    plain = np.full((8, 8, 3), COLORS["red"], np.uint8)
    framed = np.pad(plain, ((4, 4), (4, 4), (0, 0)), constant_values=255)
    np.testing.assert_allclose(color_histogram(framed), color_histogram(image))
    assert color_histogram(plain).sum() == 0  # nothing but background


def test_the_probe_tells_groups_apart_and_a_constant_input_does_no_harm():
    rng = np.random.default_rng(0)
    labels = ["a", "b", "c"] * 40
    centres = np.array([[2, 0, 0, 1], [0, 2, 0, 1], [0, 0, 2, 1]])
    inputs = centres[np.arange(120) % 3] + rng.normal(0, 0.3, (120, 4)) * [1, 1, 1, 0]
    probe = Probe(inputs[:60], labels[:60])
    assert np.mean([a == b for a, b in zip(probe(inputs[60:]), labels[60:], strict=True)]) > 0.95


def test_prompts_ask_for_subjects_that_are_trained_on():
    assert len(subjects()) == len(set(subjects().values())) == 80
    assert {split_of(subject, "no style") for subject in subjects().values()} <= {"train", "heldout_pairs"}


@pytest.mark.parametrize("kind", KINDS)
def test_requests_have_seeds_of_their_own(kind):
    found = requests(kind)
    others = [request.seed for other in KINDS if other != kind for request in requests(other)]
    assert len({request.seed for request in found}) == len(found)
    assert not {request.seed for request in found} & set(others)
    assert len(found) == SEEDS.get(kind, 1) * len({request.prompt for request in found})
    if kind != "look":
        assert {request.thing for request in found} <= set(subjects())
