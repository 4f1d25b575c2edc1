"""Drawings and sources for the tests of the icons set."""

from pathlib import Path

import numpy as np
from PIL import Image

from datasets.icons.sources import SOURCES

BY_NAME = {source.name: source for source in SOURCES}


NOTO, MONO, STREAMLINE = BY_NAME["noto"], BY_NAME["fluent-mono"], BY_NAME["streamline"]


DISC = '<circle cx="64" cy="64" r="50" fill="#d03010"/><circle cx="50" cy="50" r="20" fill="#fff"/>'


MONO_DISC = '<circle cx="16" cy="16" r="12" fill="currentColor"/>'


def read_pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)
