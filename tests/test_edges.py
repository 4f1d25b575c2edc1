"""Canny's detector against OpenCV's, pixel by pixel, and against edges known beforehand."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxdiff.io.edges import canny

IMAGES = Path(__file__).parent.parent / "docs" / "images"


def images() -> dict[str, np.ndarray]:
    """Drawings, noise, blurred noise and noise of few values (with many ties); also the smallest sizes."""
    rng = np.random.default_rng(0)
    drawings = {p.stem: np.asarray(Image.open(p).convert("RGB")) for p in sorted(IMAGES.glob("*.png"))}
    noise = rng.integers(0, 256, (90, 121, 3), np.uint8)
    blurred = np.asarray(Image.fromarray(noise).resize((400, 300), Image.Resampling.BICUBIC))
    coarse = rng.integers(0, 4, (90, 121, 3), np.uint8) * np.uint8(60)
    shapes = ((1, 1), (1, 9), (9, 1), (2, 2))
    smallest = {str(s): rng.integers(0, 256, (*s, 3), np.uint8) for s in shapes}
    return drawings | {"noise": noise, "blurred": blurred, "coarse": coarse} | smallest


@pytest.mark.slow
@pytest.mark.parametrize(("low", "high"), [(100, 200), (20, 60), (0, 0), (50.5, 800)])
def test_edges_equal_opencvs(low, high):
    """Both work on integers alone, so that not one pixel may differ."""
    cv2 = pytest.importorskip("cv2")
    found = 0
    for name, image in images().items():
        ours, theirs = canny(image, low, high), cv2.Canny(image, low, high)
        assert ours.shape == image.shape
        assert ours.dtype == np.uint8
        for channel in range(3):
            np.testing.assert_array_equal(ours[..., channel], theirs, err_msg=name)
        found += (theirs > 0).sum()
    assert found > 10_000


def test_a_square_gives_its_outline():
    """One pixel wide, closed, and the same whichever channel the square is in."""
    for channel in range(3):
        image = np.zeros((20, 20, 3), np.uint8)
        image[5:15, 5:15, channel] = 255
        edges = canny(image)[..., 0] > 0
        assert edges[8].sum() == edges[:, 8].sum() == 2  # its two sides, crossed in the middle
        assert not edges[7:13, 7:13].any()
        assert not edges[:3].any()


def test_weak_edges_are_kept_where_a_strong_one_begins_them():
    """A line that fades out: followed down to `low` from its strong end; alone, its weak part is no edge."""
    image = np.zeros((9, 60, 3), np.uint8)
    image[4:] = np.linspace(100, 10, 60)[:, None]
    whole = canny(image, 100, 300)[..., 0]
    followed = np.flatnonzero(whole.any(0))
    assert np.array_equal(followed, np.arange(followed[-1] + 1))  # unbroken from the strong end
    # Strength there is 4 times the value, and up to 3 * 4 for the slope along the line.
    assert 100 - 12 <= 4 * int(image[-1, followed[-1], 0]) <= 100
    assert not canny(image[:, 40:], 100, 300).any()


@pytest.mark.parametrize(
    ("image", "low", "high", "sentence"),
    [
        (np.zeros((4, 4, 3)), 100, 200, r"image is float64 \[4, 4, 3\]: give uint8"),
        (np.zeros((4, 4), np.uint8), 100, 200, r"image is uint8 \[4, 4\]"),
        (np.zeros((4, 4, 4), np.uint8), 100, 200, r"image is uint8 \[4, 4, 4\]"),
        (np.zeros((0, 4, 3), np.uint8), 100, 200, r"image is uint8 \[0, 4, 3\]"),
        (np.zeros((4, 4, 3), np.uint8), 200, 100, r"low 200 and high 100 must be in order"),
        (np.zeros((4, 4, 3), np.uint8), -1, 100, r"low -1 and high 100 must be in order"),
    ],
)
def test_bad_input_is_named(image, low, high, sentence):
    with pytest.raises(ValueError, match=sentence):
        canny(image, low, high)
