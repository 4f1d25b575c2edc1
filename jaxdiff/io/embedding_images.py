"""Textual inversions in images, as the AUTOMATIC1111 web UI shares them: tensors in a PNG's text chunk.

The text is base64 of a JSON object such as {"string_to_param": {"*": {"TORCHTENSOR": [[0.1, …]]}}, "name": "cat"}. The
web UI also hides it in the image's pixels, which are not read here.
"""

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jaxdiff.data.images import MAX_PIXELS
from jaxdiff.errors import WeightsError
from jaxdiff.files import first_bytes, not_fetched
from jaxdiff.io.tensor_files import TensorSource

CHUNK = "sd-ti-embedding"
TENSOR = "TORCHTENSOR"
PNG = b"\x89PNG\r\n\x1a\n"
SUFFIXES = (".png", ".webp", ".jpg", ".jpeg", ".avif", ".jxl")
MAX_BYTES = 2**26  # of a file; Pillow has the same limit for texts, compressed or not


def is_image(path: Path) -> bool:
    """Whether a file is an image, by its name, or a PNG, by its content."""
    if not path.is_file():
        return False
    return path.suffix.lower() in SUFFIXES or first_bytes(path).startswith(PNG)


def open_image_embedding(path: Path) -> tuple[TensorSource, str]:
    """The tensors in an image, named as in the web UI's `.pt` files, and the embedding's word.

    Raises:
        WeightsError: the image holds no embedding, or a damaged one.
    """
    try:
        text = _read_chunk(path)
        if text is None:
            raise WeightsError(
                f"{path} is an image without a text {CHUNK!r}, in which the AUTOMATIC1111 web UI keeps an embedding; "
                "one in the image's pixels alone is not read: give the embedding's .safetensors or .pt file, or the "
                "PNG as it was first saved."
            )
        content = json.loads(base64.b64decode(text, validate=True))
        tensors = dict(_find_tensors(content, ()))
        word = content.get("name")
    except WeightsError:
        raise
    except OSError as e:
        raise WeightsError(f"{path} cannot be read as a PNG ({e.strerror or e}): fetch it again.") from None
    except Exception as e:  # damage shows as errors of many kinds: of Pillow, base64, JSON, numpy
        raise WeightsError(f"{path} holds a damaged embedding ({e}): fetch it again.") from None
    shapes = {name: list(x.shape) for name, x in tensors.items()}
    return TensorSource(path, shapes, tensors.__getitem__), word if isinstance(word, str) and word else path.stem


def _read_chunk(path: Path) -> str | None:
    """The text chunk with the embedding, which may follow the pixels; None if there is none."""
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if (reason := not_fetched(data[:64])) is not None:
        raise WeightsError(f"{path} {reason}")
    if not data.startswith(PNG):
        return None
    if len(data) > MAX_BYTES:
        raise WeightsError(f"{path} is larger than the {MAX_BYTES >> 20} MiB that an image with an embedding may have.")
    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        if CHUNK not in image.info and image.width * image.height <= MAX_PIXELS:
            image.load()
        return image.info.get(CHUNK)


def _find_tensors(value: Any, keys: tuple[str, ...]) -> Iterator[tuple[str, np.ndarray]]:
    """Every {TENSOR: numbers} in a JSON object, named by the path of keys to it."""
    if isinstance(value, dict):
        if TENSOR in value:
            yield ".".join(keys), np.asarray(value[TENSOR], np.float32)
            return
        for key, child in value.items():
            yield from _find_tensors(child, (*keys, key))
