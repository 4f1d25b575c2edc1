"""Images of the icons set: captions, splits, rendering, filters, and which are made of a drawing."""

from collections import Counter

import numpy as np
import pytest

pytest.importorskip("cv2")
pytest.importorskip("resvg_py")

from datasets.icons import effects, render
from datasets.icons.captions import captions, indefinite
from datasets.icons.drawings import Drawing, _square
from datasets.icons.lexicon import OBJECTS, PEOPLE, TRAVEL, Subject
from datasets.icons.sources import COLORS, PAINTINGS, SOURCES, Style
from datasets.icons.splits import ALWAYS_TRAINED, HELD_OUT, SPLITS, split_of, subject_key
from datasets.icons.variants import image_specs
from tests.support.icons import DISC, MONO, NOTO, read_pixels


def _disc(size: int = 64) -> np.ndarray:
    return np.asarray(render.render_svg(_square(DISC, 128, 128), size))


# Captions and names


def test_captions_start_with_subject_and_style_and_end_without():
    subject = Subject("castle", ("european castle",), ("building",), 5)
    found = captions(subject, Style("flat emoji", ("flat design",), "a flat emoji of"))
    assert found == [
        "a castle, flat emoji",
        "castle, flat emoji",
        "a castle, flat design",
        "a flat emoji of a castle",
        "a european castle, flat emoji",
        "a castle, building, flat emoji",
        "a european castle",
        "a castle",
        "a castle",
        "a castle",
    ]


def test_what_a_filter_made_is_not_what_the_bare_subject_asks_for():
    found = image_specs(_drawing(NOTO, Subject("castle", ("fort",), group=TRAVEL)))
    for spec in found:
        plain = {"a castle", "a fort"} & set(spec.text)
        assert plain == ({"a castle", "a fort"} if spec.effect is None else set())
        assert spec.repeats == (3 if spec.effect is None else 1)
        assert spec.group == "travel"


def test_icons_in_a_colour_are_asked_for_as_people_do():
    style = Style("single color icon", ("stencil",), "a single color icon of")
    found = captions(Subject("owl"), style, "black", plain=False)
    assert "a black icon of an owl" in found
    assert "a black owl, single colour icon" in found
    assert "a black owl" not in found


def test_every_caption_of_a_coloured_drawing_names_its_colour():
    subject = Subject("owl", ("night bird",), ("animal",), 3)
    found = captions(subject, Style("silhouette", ("shadow",), "a silhouette of"), "orange")
    assert "an orange owl, silhouette" in found
    assert all("orange" in text for text in found)


def test_grey_is_also_spelt_gray():
    found = captions(Subject("owl"), Style("silhouette"), "grey")
    assert {"a gray owl, silhouette", "a grey owl, silhouette"} <= set(found)


def test_pairs_are_said_as_pairs():
    assert "a pair of sunglasses, 3d render" in captions(Subject("sunglasses"), Style("3d render"))


def test_names_that_are_no_things_take_no_article():
    assert captions(Subject("add image", counted=False), Style("icon"))[0] == "add image, icon"


@pytest.mark.parametrize(
    ("phrase", "expected"),
    [
        ("unicorn", "a unicorn"),
        ("hourglass", "an hourglass"),
        ("SOS button", "an SOS button"),
        ("roll of paper", "a roll of paper"),
        ("grapes", "grapes"),
        ("bowl of noodles", "a bowl of noodles"),
        ("fire", "fire"),
        ("fire engine", "a fire engine"),
        ("letter A", "letter A"),
        ("Statue of Liberty", "the Statue of Liberty"),
        ("octopus", "an octopus"),
        ("woman's hat", "a woman's hat"),
        ("six o'clock", "six o'clock"),
    ],
)
def test_articles(phrase, expected):
    assert indefinite(phrase) == expected


# Splits


def test_splits_are_fixed_for_ever():
    """Values of the published rule: sha256 of "subject:<key>" and "pair:<key>|<style>", below 3% of its range."""
    assert [split_of(s, "cartoon emoji") for s in ("frog", "trophy", "fox")] == [
        "heldout_subjects",
        "heldout_subjects",
        "train",
    ]


def test_a_held_out_subject_is_held_out_in_every_style():
    styles = [source.style.name for source in SOURCES] + [style.name for style in PAINTINGS.values()]
    subjects = [f"thing {i}" for i in range(400)]
    for subject in subjects:
        found = {split_of(subject, style) for style in styles}
        assert "heldout_subjects" not in found or found == {"heldout_subjects"}


def test_shares_of_the_splits():
    count = 4000
    splits = Counter(split_of(f"thing number {i}", "3d render") for i in range(count))
    # Binomial with p = 0.03: five standard deviations are 0.0135.
    for split in ("heldout_subjects", "heldout_pairs"):
        assert abs(splits[split] / count - HELD_OUT) < 5 * (HELD_OUT * (1 - HELD_OUT) / count) ** 0.5
    assert set(splits) == set(SPLITS)


def test_subjects_that_examples_draw_are_always_trained():
    styles = [f"style {i}" for i in range(200)]
    assert {split_of(subject, style) for subject in (*ALWAYS_TRAINED, "dog face") for style in styles} == {"train"}


def test_near_twins_share_a_key():
    assert subject_key("man farmer") == subject_key("woman farmer facing right") == subject_key("farmer")
    assert subject_key("red apple") == subject_key("green apples")
    assert subject_key("glass") == "glass"
    assert subject_key("woman") == "woman"


# Rendering


def test_svg_is_drawn_centred_with_a_margin():
    image = _disc(128)
    assert image.shape == (128, 128, 4)
    assert image[2, 64, 3] == 0  # the disc of radius 50 ends 14 + 4 pixels from the rim
    assert tuple(image[100, 64]) == (0xD0, 0x30, 0x10, 255)


def test_wide_drawings_keep_their_proportions():
    svg = _square('<rect width="40" height="20" fill="#000"/>', 40, 20)
    alpha = np.asarray(render.render_svg(svg, 64))[..., 3] > 128
    height, width = alpha.any(1).sum(), alpha.any(0).sum()
    assert abs(int(width) - 60) <= 1  # 64 less two margins of 2; a rim may fall between two pixels
    assert abs(int(height) - 30) <= 1


def test_what_an_animation_fades_in_is_shown():
    animation = '<animate attributeName="opacity" values="0;1"/>'
    body = f'<rect width="9" height="9" fill="#00f" opacity="0">{animation}</rect>'
    assert np.asarray(render.render_svg(_square(body, 9, 9), 64))[32, 32].tolist() == [0, 0, 255, 255]


def test_trimming_finds_a_small_drawing_on_a_big_page():
    svg = '<svg xmlns="http://www.w3.org/2000/svg" width="210mm" height="297mm" viewBox="0 0 210 297">'
    image = render.trimmed(f'{svg}<circle cx="150" cy="200" r="6" fill="#00f"/></svg>', 64)
    alpha = np.asarray(image)[..., 3] > 128
    assert abs(int(alpha.any(0).sum()) - 60) <= 1  # the antialiased rim may lose a pixel
    assert np.asarray(image)[32, 32].tolist() == [0, 0, 255, 255]
    assert render.trimmed(f"{svg}</svg>", 64) is None


def test_opaque_pages_lose_their_alpha(tmp_path):
    svg = '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><rect width="9" height="9" fill="#070"/></svg>'
    render.save(np.asarray(render.trimmed(svg, 64)), tmp_path / "page.webp")
    assert read_pixels(tmp_path / "page.webp").shape == (64, 64, 3)


def test_images_are_lossless(tmp_path):
    image = _disc()
    image = np.where(image[..., 3:] == 0, np.uint8(0), image)
    render.save(image, tmp_path / "disc.webp")
    np.testing.assert_array_equal(read_pixels(tmp_path / "disc.webp"), image)
    assert [path.name for path in tmp_path.iterdir()] == ["disc.webp"]


def test_broken_and_blank_drawings_are_reported(tmp_path):
    output = (render.Output(tmp_path / "x.webp", None, None),)
    assert "blank" in render.write(render.Job(_square("<g/>", 9, 9), None, False, 64, output))
    assert "x: " in render.write(render.Job("<svg", None, False, 64, output))
    assert "x: " in render.write(render.Job(None, tmp_path / "no.svg", True, 64, output))
    assert not (tmp_path / "x.webp").exists()


# Filters


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("name", sorted(effects.EFFECTS))
def test_filters_paint_over_and_keep_the_shape(name, size):
    image = _disc(size)
    painted = effects.EFFECTS[name](image, np.random.default_rng(0))
    again = effects.EFFECTS[name](image, np.random.default_rng(0))
    assert painted.shape == image.shape
    assert painted.dtype == np.uint8
    np.testing.assert_array_equal(painted, again)
    solid = image[..., 3] > 128
    moved = (solid != (painted[..., 3] > 128)).mean()
    assert moved < 0.05  # edges wobble by a pixel or two of a disc whose rim is 7% of the image
    inside = solid & (painted[..., 3] > 128)
    assert np.abs(painted[inside][:, :3].astype(int) - image[inside][:, :3]).mean() > 1
    assert not painted[painted[..., 3] == 0].any()


def test_pencil_and_line_are_without_colour():
    for name in ("pencil", "line"):
        painted = effects.EFFECTS[name](_disc(), np.random.default_rng(0))
        assert (painted[..., 0] == painted[..., 2]).all()


def test_pixel_art_has_blocks_and_few_colours():
    painted = effects.pixel(_disc(128), np.random.default_rng(0))
    np.testing.assert_array_equal(painted, painted[::4, ::4].repeat(4, 0).repeat(4, 1))
    assert len(np.unique(painted.reshape(-1, 4), axis=0)) <= 17


def test_fill_keeps_alpha_and_sets_the_colour():
    image = _disc()
    filled = effects.fill(image, COLORS["red"])
    np.testing.assert_array_equal(filled[..., 3], image[..., 3])
    assert (filled[image[..., 3] > 0][:, :3] == COLORS["red"]).all()


def test_tint_changes_the_main_colour_only():
    image = _disc(128)
    tinted = effects.tint(image, COLORS["blue"])
    assert np.abs(tinted[100, 64, :3].astype(int) - COLORS["blue"]).max() < 40  # lightness is kept in part
    assert tinted[46, 46].tolist() == image[46, 46].tolist() == [255, 255, 255, 255]
    np.testing.assert_array_equal(tinted[..., 3], image[..., 3])


def test_tint_refuses_what_has_no_other_colour_to_take():
    image = _disc()
    assert effects.tint(image, (200, 50, 20)) is None  # red already
    assert effects.tint(effects.pencil(image, np.random.default_rng(0)), COLORS["blue"]) is None


# The plan


def _drawing(source, subject: Subject) -> Drawing:
    return Drawing(source, "thing", subject, source.style, svg="")


def test_a_thing_is_painted_filled_and_tinted():
    found = image_specs(_drawing(NOTO, Subject("castle", group=TRAVEL)))
    assert Counter(spec.effect for spec in found) == Counter([None, *PAINTINGS, *["fill"] * 3, *["tint"] * 3])
    assert len({spec.file_name for spec in found}) == len(found)
    for spec in found:
        assert (spec.color is None) == (spec.effect not in ("fill", "tint"))
        assert spec.color is None or all(spec.color in text or "gray" in text for text in spec.text)


def test_faces_and_symbols_are_painted_only():
    effects = {spec.effect for spec in image_specs(_drawing(NOTO, Subject("grinning face", group=0)))}
    assert effects == {None, *PAINTINGS}


def test_things_named_by_their_colour_keep_it():
    named = Subject("orange book", group=OBJECTS)
    assert {spec.effect for spec in image_specs(_drawing(NOTO, named))} == {None, "watercolor", "oil", "pixel"}
    assert image_specs(_drawing(MONO, named)) == []


def test_people_are_not_given_colours():
    """Of "a black woman" one would not read that the ink is meant."""
    woman = Drawing(MONO, "woman", Subject("woman", group=PEOPLE), MONO.style, svg="")
    assert image_specs(woman) == []
    assert not any(p.color for p in image_specs(woman._replace(source=NOTO, style=NOTO.style)))
