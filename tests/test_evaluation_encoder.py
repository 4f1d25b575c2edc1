"""The encoders that measure images: folders of both kinds, features equal to PyTorch's, and features kept on disk."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from jaxdiff.config import ConfigError
from jaxdiff.data.captioned import open_source
from jaxdiff.data.images import on_background
from jaxdiff.errors import WeightsError
from jaxdiff.evaluation import features as kept
from jaxdiff.evaluation.encoder import encode_images, encode_texts, load_encoder, square, token_ids
from jaxdiff.evaluation.features import cached_features
from tests.support import evaluation_folders as folders

# Each float32 operation errs by 2**-24 relatively; some hundred in a row give about 1e-6, as in test_models.py.
TOLERANCE = 1e-5
TEXTS = ["a castle", "a red dragon", "blurry", "a blue house, a red dragon and a castle beside another house, blurry"]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return folders.clip_model_folder(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def clip(clip_folder):
    return load_encoder(clip_folder)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (3, folders.SIZE, folders.SIZE, 3), np.uint8)


def error(ours, reference) -> float:
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    assert ours.shape == reference.shape
    return float(np.linalg.norm(ours - reference) / np.linalg.norm(reference))


def test_features_and_scores_are_those_of_transformers(clip_folder, clip, images):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.CLIPModel.from_pretrained(clip_folder).eval()
    assert {name for name, _ in model.named_parameters()} >= {"logit_scale", "visual_projection.weight"}
    encoder, params = clip
    tokens = encoder.tokenizer(TEXTS)
    pixels = (images / 255 - np.array(encoder.mean)) / np.array(encoder.std)
    with torch.no_grad():
        found = model(
            input_ids=torch.from_numpy(tokens).long(),
            pixel_values=torch.from_numpy(pixels.transpose(0, 3, 1, 2)).float(),
        )
        raw = model.visual_projection(model.vision_model(torch.from_numpy(pixels.transpose(0, 3, 1, 2)).float())[1])
    ours, texts = encode_images(encoder, params, images), encode_texts(encoder, params, TEXTS, batch_size=3)[0]
    assert error(ours, raw) < TOLERANCE
    unit, text_unit = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (ours, texts))
    assert error(unit, found.image_embeds) < TOLERANCE
    assert error(text_unit, found.text_embeds) < TOLERANCE
    cosines = found.logits_per_image / model.logit_scale.exp().item()
    assert np.abs(np.asarray(unit @ text_unit.T) - cosines.numpy()).max() < 2 * TOLERANCE  # of two vectors each


def test_a_folder_that_transformers_wrote_opens(clip_folder, clip, images, tmp_path):
    transformers = pytest.importorskip("transformers")
    transformers.CLIPModel.from_pretrained(clip_folder).save_pretrained(tmp_path)
    for path in Path(clip_folder).glob("*"):
        if not (tmp_path / path.name).exists():
            shutil.copy(path, tmp_path)
    assert error(encode_images(*load_encoder(tmp_path), images), encode_images(*clip, images)) < TOLERANCE


def test_a_jaxdiff_folder_gives_the_same(clip, images, tmp_path):
    other = load_encoder(folders.parts_folder(tmp_path / "parts"))
    text = [encode_texts(*pair, TEXTS)[0] for pair in (clip, other)]
    assert error(encode_images(*other, images), encode_images(*clip, images)) < TOLERANCE
    assert error(text[1], text[0]) < TOLERANCE


def test_a_preprocessor_config_says_how_pixels_are_normalised(clip_folder, clip, images, tmp_path):
    folder = shutil.copytree(clip_folder, tmp_path / "clip")
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}))
    encoder, params = load_encoder(folder)
    assert (encoder.mean, encoder.std) == ((0.5,) * 3, (0.25,) * 3)
    assert error(encode_images(encoder, params, images), encode_images(*clip, images)) > 100 * TOLERANCE
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_std": [0, 1, 1]}))
    with pytest.raises(ConfigError, match="image_std"):
        load_encoder(folder)


def test_tokens_are_the_tokenizers_own(clip):
    tokenizer = clip[0].tokenizer
    ids, cut = token_ids(tokenizer, [*TEXTS, ""])
    np.testing.assert_array_equal(ids, tokenizer([*TEXTS, ""]))
    assert cut == 1  # the last of TEXTS


@pytest.mark.parametrize("width", [80, 88, 60, 41])
def test_images_are_cut_as_clip_cuts_them(width):
    """The shorter side resized, the longer one to whole pixels, and of it the middle; Pillow rounds in between."""
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (60, width, 3), np.uint8))
    size, short = 16, min(60, width)
    resized = image.resize((int(size * width / short), int(size * 60 / short)), Image.Resampling.BICUBIC)
    left, top = (resized.width - size) // 2, (resized.height - size) // 2
    reference = np.asarray(resized.crop((left, top, left + size, top + size)), int)
    assert np.abs(square(image, size).astype(int) - reference).max() <= 1


def test_a_long_strip_does_not_grow():
    assert square(Image.new("RGB", (30_000, 3)), 224).shape == (224, 224, 3)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda f: shutil.rmtree(f), "is not a folder: give a folder of a CLIP model"),
        (lambda f: (f / "config.json").unlink(), "holds no vision encoder"),
        (lambda f: (f / "config.json").write_text("{"), "cannot be read as JSON"),
        (lambda f: (f / "config.json").write_text('{"model_type": "siglip"}'), "describes a siglip, not a clip model"),
        (lambda f: (f / "model.safetensors").unlink(), "is missing"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 100), "is damaged"),
        (lambda f: (f / "vocab.json").unlink(), "holds no CLIP vocabulary"),
        (lambda f: edit(f, "vision_config", hidden_size=32), "has shape"),
        (lambda f: edit(f, "text_config", vocab_size=100), "has shape"),
        (lambda f: edit(f, "text_config", hidden_act="tanh"), "hidden_act"),
    ],
)  # fmt: skip
def test_folders_that_are_no_encoder(clip_folder, tmp_path, damage, sentence):
    folder = shutil.copytree(clip_folder, tmp_path / "clip")
    damage(folder)
    with pytest.raises((ConfigError, WeightsError), match=sentence) as raised:
        load_encoder(folder)
    assert "\n" not in str(raised.value)


def edit(folder: Path, part: str, **values) -> None:
    config = json.loads((folder / "config.json").read_text())
    config[part] |= values
    (folder / "config.json").write_text(json.dumps(config))


# --- features kept on disk


@pytest.fixture
def source(tmp_path):
    return open_source(folders.data_folder(tmp_path / "data", 20, 2))


def counted(monkeypatch, stop_after: int | None = None) -> list[int]:
    """Numbers of records as they are encoded; after so many parts the work is killed."""
    done: list[int] = []
    original = kept.encode_records

    def encode(source, rows, *args, **kwargs):
        if stop_after is not None and len(done) == stop_after:
            raise KeyboardInterrupt
        done.append(len(rows))
        return original(source, rows, *args, **kwargs)

    monkeypatch.setattr(kept, "encode_records", encode)
    return done


def test_killed_it_goes_on(source, clip, tmp_path, monkeypatch):
    how = {"part": 6, "batch_size": 4}
    whole = cached_features(source, tmp_path / "a", *clip, **how)
    counted(monkeypatch, stop_after=2)
    with pytest.raises(KeyboardInterrupt):
        cached_features(source, tmp_path / "b", *clip, **how)
    monkeypatch.undo()
    (folder,) = (tmp_path / "b").iterdir()
    (folder / ".000002.123").mkdir()  # a part half written by a process that was killed
    done = counted(monkeypatch)
    resumed = cached_features(source, tmp_path / "b", *clip, **how)
    assert done == [6, 2]
    assert [p.name for p in sorted(folder.iterdir())] == [f"{i:06d}" for i in range(4)]
    assert resumed.index.tolist() == list(range(20))
    for name in ("features", "pixels"):
        ours, reference = (np.concatenate(list(f.chunks(name))) for f in (resumed, whole))
        np.testing.assert_array_equal(ours, reference)
    done.clear()
    cached_features(source, tmp_path / "b", *clip, **how)
    assert done == []


def test_rows_of_any_part_in_any_order(source, clip, tmp_path):
    found = cached_features(source, tmp_path / "kept", *clip, part=6)
    rows = np.array([19, 0, 7, 7, 5])
    every = np.concatenate(list(found.chunks("features")))
    np.testing.assert_array_equal(found.take("features", rows), every[rows])


def test_features_are_those_of_each_image_alone(source, clip, tmp_path):
    """A batch of another size may round otherwise."""
    found = cached_features(source, tmp_path / "kept", *clip, part=6, batch_size=4)
    images = [square(kept.read_rgb(source.read(i).image), folders.SIZE) for i in range(20)]
    assert error(np.concatenate(list(found.chunks("features"))), encode_images(*clip, np.stack(images))) < TOLERANCE
    pixels = np.stack([kept.small(x) for x in images])
    np.testing.assert_array_equal(np.concatenate(list(found.chunks("pixels"))), pixels)


def test_images_that_cannot_be_read_are_left_out(source, clip, tmp_path, caplog):
    path = Path(source.read(7).image)
    path.write_bytes(path.read_bytes()[:50])
    Path(source.read(8).image).unlink()
    found = cached_features(source, tmp_path / "kept", *clip, part=4)
    assert found.index.tolist() == [i for i in range(20) if i not in (7, 8)]
    assert (len(found), found.records) == (18, 20)
    assert len(caplog.records) == 1
    assert "007.png cannot be read" in caplog.text or "008.png cannot be read" in caplog.text


def test_no_image_can_be_read(source, clip, tmp_path):
    for i in range(20):
        Path(source.read(i).image).write_bytes(b"")
    with pytest.raises(ConfigError, match="None of the 20 images"):
        cached_features(source, tmp_path / "kept", *clip, part=8)


def test_other_images_and_other_encoders_are_computed_anew(source, clip, tmp_path, monkeypatch):
    folder = tmp_path / "kept"
    cached_features(source, folder, *clip)
    Image.new("RGB", (9, 9), "red").save(source.read(3).image)  # the same name
    done = counted(monkeypatch)
    first = cached_features(source, folder, *clip)
    encoder, params = clip
    other = {**params, "vision_encoder": {**params["vision_encoder"]}}
    other["vision_encoder"]["visual_projection"] = {"kernel": -params["vision_encoder"]["visual_projection"]["kernel"]}
    second = cached_features(source, folder, encoder, other)
    assert done == [20, 20]
    assert len(list(folder.iterdir())) == 3
    np.testing.assert_allclose(second.take("features", [3]), -first.take("features", [3]), rtol=1e-6)


def test_features_that_are_not_finite_are_refused_and_not_kept(source, clip, tmp_path):
    encoder, params = clip
    damaged = jax.tree.map(lambda x: np.full_like(x, np.nan), params)
    with pytest.raises(WeightsError, match="not finite, so its weights are damaged: give another --encoder"):
        cached_features(source, tmp_path / "kept", encoder, damaged)
    assert not list(tmp_path.glob("kept/*/*"))
    with pytest.raises(WeightsError, match="not finite"):
        encode_texts(encoder, damaged, TEXTS)


def test_a_damaged_part_is_named(source, clip, tmp_path):
    cached_features(source, tmp_path / "kept", *clip, part=6)
    (part,) = (tmp_path / "kept").glob("*/000001")
    (part / "features.npy").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"000001 is damaged .* delete that folder"):
        cached_features(source, tmp_path / "kept", *clip, part=6)


def test_a_folder_that_cannot_be_written(source, clip, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        cached_features(source, tmp_path / "file", *clip)


def test_transparent_images_lie_on_white():
    image = Image.new("RGBA", (4, 4), (200, 0, 0, 0))
    assert np.asarray(on_background(image)).min() == 255


def test_pixel_distances_are_root_mean_squares():
    x = np.random.default_rng(0).integers(0, 256, (2, 3 * kept.SIDE**2), np.uint8)
    a, b = kept.pixel_values(x)
    reference = np.sqrt((((x[0] - x[1].astype(float)) / 255) ** 2).mean())
    assert np.linalg.norm(a - b) == pytest.approx(reference, rel=1e-5)
