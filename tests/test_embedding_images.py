"""Textual inversions in the text of a PNG, as the AUTOMATIC1111 web UI shares them."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from jaxdiff.errors import WeightsError
from jaxdiff.io.textual_inversion import load_textual_inversion
from tests.support.tiny import with_two_text_encoders
from tests.test_textual_inversion import table, vectors


def embedding_png(path, held: dict, *, compressed=False, after=False):
    """An image with an embedding as AUTOMATIC1111 writes it; the text may be compressed, or stand after the pixels."""
    text = base64.b64encode(json.dumps(held, default=lambda x: {"TORCHTENSOR": x.tolist()}).encode()).decode()
    info = PngInfo()
    info.add_text("sd-ti-embedding", text, compressed)
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "png", pnginfo=info)
    data = file.getvalue()
    if after:  # the chunks of texts behind those of pixels
        begin, end = data.index(b"zTXt" if compressed else b"tEXt") - 4, data.index(b"IDAT") - 4
        data = data[:begin] + data[end:-12] + data[begin:end] + data[-12:]
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(("compressed", "after"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("suffix", [".png", ".PNG", ".pt"])
def test_an_embedding_in_the_text_of_a_png(compressed, after, suffix, tiny, tmp_path):
    """The word is the one that the file says, else the file's name."""
    rows = vectors(2, 16)
    held = {"string_to_token": {"*": 265}, "string_to_param": {"*": rows}, "name": "my cat", "step": 500, "hash": None}
    for name, given in (("my cat", held), ("plain", {"string_to_param": {"*": rows}}), ("<dog>", {"<dog>": rows})):
        file = embedding_png(tmp_path / f"plain{suffix}", given, compressed=compressed, after=after)
        model, params = load_textual_inversion(*tiny, file)
        np.testing.assert_array_equal(table(params)[model.tokenizer.added_ids(name)], rows)
    model, params = load_textual_inversion(*tiny, file, "<own>")
    assert model.tokenizer.added_ids("<own>")


def test_two_text_encoders_in_the_text_of_a_png(tmp_path):
    held = {"clip_l": vectors(2, 16), "clip_g": vectors(2, 24), "name": "cat"}
    model, params = load_textual_inversion(*with_two_text_encoders(), embedding_png(tmp_path / "a.png", held))
    for encoder, rows in (("text_encoder", held["clip_l"]), ("text_encoder_2", held["clip_g"])):
        np.testing.assert_array_equal(table(params, encoder)[model.tokenizer.added_ids("cat")], rows)


def test_images_without_an_embedding_that_can_be_read(tiny, tmp_path):
    def refused(name, content, message):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(WeightsError, match=message) as error:
            load_textual_inversion(*tiny, tmp_path / name)
        assert str(tmp_path / name) in str(error.value)
        assert "\n" not in str(error.value)

    def text(value):
        file, info = io.BytesIO(), PngInfo()
        info.add_text("sd-ti-embedding", value)
        Image.new("RGB", (1, 1)).save(file, "png", pnginfo=info)
        return file.getvalue()

    def held(value):
        return text(base64.b64encode(json.dumps(value).encode()).decode())

    for kind, name in (("png", "a.png"), ("webp", "a.webp"), ("jpeg", "a.jpg")):
        file = io.BytesIO()
        Image.new("RGB", (8, 8)).save(file, kind)
        refused(
            name, file.getvalue(), "is an image without a text .* in the image's pixels alone is not read: give the"
        )
    refused("b.png", text("%"), "holds a damaged embedding")
    refused("c.png", held([1]), "holds a damaged embedding")
    refused("d.png", text(base64.b64encode(b"[" * 100000).decode()), "holds a damaged embedding")
    refused("e.png", held({"<cat>": {"TORCHTENSOR": [[1.0], [1.0, 2.0]]}}), "holds a damaged embedding")
    refused("f.png", held({"name": "cat"}), "holds no embeddings")
    refused("g.png", held({"<cat>": {"TORCHTENSOR": [[1.0] * 24]}}), "it is not a textual inversion, or is one for")
    refused("h.png", text("")[:60], "cannot be read as a PNG|damaged")
    refused("i.png", b"version https://git-lfs.github.com/spec/v1", "is a Git LFS pointer")
