"""What tells styles and colours apart: fitted on drawings of the icons set, tested on drawings of subjects held out."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.judge_drawings import Row, features_of, read, rows, sample_rows
from benchmarks.judge_features import Images, cached_arrays
from benchmarks.judge_measures import Probe, color_histogram
from datasets.icons.sources import COLORS

STYLE_ROWS = {"train": 100, "heldout_subjects": 40}  # of each style
COLOR_ROWS = {"train": 3000, "heldout_subjects": 400}  # in all
SAME = {"silhouette": "single color icon"}  # styles that nobody could tell apart
SHIFT = 12  # standard deviation of the shift of colours that the probe learns to bear, in 0..255


def rows_by_style(data: Path, split: str, styles: Sequence[str], subjects: set[str]) -> list[Row]:
    """Images of things in each of the styles."""
    candidates = [row for row in rows(data, split) if row.subject in subjects]
    selected: list[Row] = []
    for style in styles:
        selected += sample_rows(
            [row for row in candidates if SAME.get(row.style, row.style) == style], STYLE_ROWS[split]
        )
    return selected


def style_probe(data: Path, styles: Sequence[str], subjects: set[str]) -> tuple[Probe, list[str], list[str]]:
    """The probe of styles; of real drawings of held-out subjects, the styles and what the probe takes them for."""
    train, test = (rows_by_style(data, split, styles, subjects) for split in STYLE_ROWS)
    labels, answers = ([SAME.get(row.style, row.style) for row in part] for part in (train, test))
    probe = Probe(features_of("styles", train), labels)
    return probe, answers, probe(features_of("styles", test))


def histograms(images: Images, shift: float = 0.0) -> np.ndarray:
    """Histograms of the colours of images, each channel shifted at random by about so much."""
    rng = np.random.default_rng(0)
    shifted = (np.clip(image + rng.normal(0, shift, 3), 0, 255).astype(np.uint8) for image in images)
    return np.stack([color_histogram(image) for image in shifted])


def color_inputs(data: Path, split: str) -> tuple[np.ndarray, list[str]]:
    """Histograms of images of the set that were given a colour, and the colours."""
    selected = sample_rows([row for row in rows(data, split) if row.color in COLORS], COLOR_ROWS[split])
    shift = SHIFT if split == "train" else 0
    key = ([(row.path, row.path.stat().st_size) for row in selected], shift)
    arrays = cached_arrays("colors", key, lambda: {"histograms": histograms(read(selected), shift)})
    return arrays["histograms"], [row.color or "" for row in selected]


def color_probe(data: Path) -> tuple[Probe, list[str], list[str]]:
    """The probe of colours; of real drawings of held-out subjects, the colours and what the probe takes them for."""
    inputs, labels = color_inputs(data, "train")
    test, answers = color_inputs(data, "heldout_subjects")
    probe = Probe(inputs, labels)
    return probe, answers, probe(test)
