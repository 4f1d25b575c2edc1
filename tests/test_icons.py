"""The builder of the icons set, without the network: a tiny package stands in for the real ones."""

import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("cv2")
pytest.importorskip("resvg_py")
from PIL import Image

from jaxdiff.data.icons import build as building
from jaxdiff.data.icons import clipart, fetch, filters, render
from jaxdiff.data.icons.captions import captions, indefinite
from jaxdiff.data.icons.drawings import Drawing, _square, read_drawings
from jaxdiff.data.icons.lexicon import FOOD, OBJECTS, PEOPLE, TRAVEL, Lexicon, Subject
from jaxdiff.data.icons.plan import pictures
from jaxdiff.data.icons.sources import COLORS, PAINTINGS, SOURCES, Style, select
from jaxdiff.data.icons.splits import ALWAYS_TRAINED, SHARE, SPLITS, split_of, subject_key

BY_NAME = {source.name: source for source in SOURCES}
NOTO, MONO, STREAMLINE = BY_NAME["noto"], BY_NAME["fluent-mono"], BY_NAME["streamline"]
DISC = '<circle cx="64" cy="64" r="50" fill="#d03010"/><circle cx="50" cy="50" r="20" fill="#fff"/>'
MONO_DISC = '<circle cx="16" cy="16" r="12" fill="currentColor"/>'

EMOJI = [
    ("castle", "1F3F0", 5, ["building", "european"]),
    ("dog face", "1F436", 3, ["puppy", "pet", "dogs"]),
    ("sunglasses", "1F576", 7, ["dark", "eyewear"]),
    ("woman: red hair", "1F469-200D-1F9B0", 1, []),
    ("flag: Chad", "1F1F9-1F1E9", 9, []),
    ("fox", "1F98A", 3, ["animal"]),
    ("horizontal traffic light", "1F6A5", 5, ["signal"]),
]


def _package(folder: Path, version: str, files: dict) -> Path:
    folder.mkdir(parents=True)
    (folder / "package.json").write_text(json.dumps({"version": version}))
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    return folder


@pytest.fixture
def cache(tmp_path) -> Path:
    """A cache that already holds tiny stand-ins for emojibase-data, noto, fluent-mono and streamline."""
    cache = tmp_path / "cache"
    data = [{"label": name, "hexcode": code, "group": group, "tags": tags} for name, code, group, tags in EMOJI]
    words = {"en/data.json": data, "en/shortcodes/github.json": {"1F3F0": "european_castle", "1F436": ["dog"]}}
    _package(cache / "emojibase-data-17.0.0", "17.0.0", words)
    icons = {name: {"body": DISC} for name in ("castle", "sunglasses", "fox", "horizontal-traffic-light", "letter-a")}
    icons |= {name: {"body": DISC} for name in ("flag-chad", "fox-light-skin-tone", "fox-medium-dark")}
    icons |= {"bear-face": {"body": DISC, "hidden": True}, "doggy": {"body": DISC}, "blank": {"body": "<g/>"}}
    aliases = {"dog-face": {"parent": "doggy"}}
    noto = {"icons.json": {"width": 128, "height": 128, "icons": icons, "aliases": aliases}}
    _package(cache / f"iconify-json-noto-{NOTO.version}", NOTO.version, noto)
    mono = {"icons.json": {"width": 32, "height": 32, "icons": {"castle": {"body": MONO_DISC}}}}
    _package(cache / f"iconify-json-fluent-emoji-high-contrast-{MONO.version}", MONO.version, mono)
    numbered = {"icons.json": {"width": 128, "height": 128, "icons": {"fox-2": {"body": DISC}, "2": {"body": DISC}}}}
    _package(cache / f"iconify-json-streamline-emojis-{STREAMLINE.version}", STREAMLINE.version, numbered)
    return cache


@pytest.fixture
def lexicon(cache) -> Lexicon:
    return Lexicon(cache / "emojibase-data-17.0.0")


def _read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


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
        "a castle",
    ]


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


def test_lexicon_finds_names_codes_and_run_together_names(lexicon):
    castle = lexicon.by_name("castle")
    assert castle == Subject("castle", ("european castle",), ("building", "european"), 5)
    assert lexicon.by_code("1f576-fe0f").name == "sunglasses"
    assert lexicon.by_run_together("europeancastle") is castle
    assert lexicon.by_name("fox-face").name == "fox"
    assert lexicon.by_name("woman-red-hair").name == "woman with red hair"
    assert lexicon.by_name("nothing") is None
    assert lexicon.countries == {"chad"}
    assert lexicon.by_code("1f1f9-1f1e9") is None


def test_skin_tones_are_told_from_names_that_end_alike(lexicon):
    assert lexicon.is_skin_tone("fox-medium-dark")
    assert lexicon.is_skin_tone("person-dark-skin-tone-bald")
    assert not lexicon.is_skin_tone("horizontal-traffic-light")


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
        assert abs(splits[split] / count - SHARE) < 5 * (SHARE * (1 - SHARE) / count) ** 0.5
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
    assert _read(tmp_path / "page.webp").shape == (64, 64, 3)


def test_pictures_are_lossless(tmp_path):
    image = _disc()
    image = np.where(image[..., 3:] == 0, np.uint8(0), image)
    render.save(image, tmp_path / "disc.webp")
    np.testing.assert_array_equal(_read(tmp_path / "disc.webp"), image)
    assert [path.name for path in tmp_path.iterdir()] == ["disc.webp"]


def test_broken_and_blank_drawings_are_reported(tmp_path):
    output = (render.Output(tmp_path / "x.webp", None, None),)
    assert "blank" in render.write(render.Job(_square("<g/>", 9, 9), None, False, 64, output))
    assert "x: " in render.write(render.Job("<svg", None, False, 64, output))
    assert "x: " in render.write(render.Job(None, tmp_path / "no.svg", True, 64, output))
    assert not (tmp_path / "x.webp").exists()


# Filters


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("name", sorted(filters.FILTERS))
def test_filters_paint_over_and_keep_the_shape(name, size):
    image = _disc(size)
    painted = filters.FILTERS[name](image, np.random.default_rng(0))
    again = filters.FILTERS[name](image, np.random.default_rng(0))
    assert painted.shape == image.shape
    assert painted.dtype == np.uint8
    np.testing.assert_array_equal(painted, again)
    solid = image[..., 3] > 128
    moved = (solid != (painted[..., 3] > 128)).mean()
    assert moved < 0.05  # edges wobble by a pixel or two of a disc whose rim is 7% of the picture
    inside = solid & (painted[..., 3] > 128)
    assert np.abs(painted[inside][:, :3].astype(int) - image[inside][:, :3]).mean() > 1
    assert not painted[painted[..., 3] == 0].any()


def test_pencil_and_line_are_without_colour():
    for name in ("pencil", "line"):
        painted = filters.FILTERS[name](_disc(), np.random.default_rng(0))
        assert (painted[..., 0] == painted[..., 2]).all()


def test_pixel_art_has_blocks_and_few_colours():
    painted = filters.pixel(_disc(128), np.random.default_rng(0))
    np.testing.assert_array_equal(painted, painted[::4, ::4].repeat(4, 0).repeat(4, 1))
    assert len(np.unique(painted.reshape(-1, 4), axis=0)) <= 17


def test_fill_keeps_alpha_and_sets_the_colour():
    image = _disc()
    filled = filters.fill(image, COLORS["red"])
    np.testing.assert_array_equal(filled[..., 3], image[..., 3])
    assert (filled[image[..., 3] > 0][:, :3] == COLORS["red"]).all()


def test_tint_changes_the_main_colour_only():
    image = _disc(128)
    tinted = filters.tint(image, COLORS["blue"])
    assert np.abs(tinted[100, 64, :3].astype(int) - COLORS["blue"]).max() < 40  # lightness is kept in part
    assert tinted[46, 46].tolist() == image[46, 46].tolist() == [255, 255, 255, 255]
    np.testing.assert_array_equal(tinted[..., 3], image[..., 3])


def test_tint_refuses_what_has_no_other_colour_to_take():
    image = _disc()
    assert filters.tint(image, (200, 50, 20)) is None  # red already
    assert filters.tint(filters.pencil(image, np.random.default_rng(0)), COLORS["blue"]) is None


# The plan


def _drawing(source, subject: Subject) -> Drawing:
    return Drawing(source, "thing", subject, source.style, svg="")


def test_a_thing_is_painted_filled_and_tinted():
    found = pictures(_drawing(NOTO, Subject("castle", group=TRAVEL)))
    assert Counter(picture.effect for picture in found) == Counter([None, *PAINTINGS, *["fill"] * 3, *["tint"] * 3])
    assert len({picture.file_name for picture in found}) == len(found)
    for picture in found:
        assert (picture.color is None) == (picture.effect not in ("fill", "tint"))
        assert picture.color is None or all(picture.color in text or "gray" in text for text in picture.text)


def test_faces_and_symbols_are_painted_only():
    effects = {picture.effect for picture in pictures(_drawing(NOTO, Subject("grinning face", group=0)))}
    assert effects == {None, *PAINTINGS}


def test_things_named_by_their_colour_keep_it():
    named = Subject("orange book", group=OBJECTS)
    assert {picture.effect for picture in pictures(_drawing(NOTO, named))} == {None, "watercolor", "oil", "pixel"}
    assert pictures(_drawing(MONO, named)) == []


# The build


def test_people_are_not_given_colours():
    """Of "a black woman" one would not read that the ink is meant."""
    woman = Drawing(MONO, "woman", Subject("woman", group=PEOPLE), MONO.style, svg="")
    assert pictures(woman) == []
    assert not any(p.color for p in pictures(woman._replace(source=NOTO, style=NOTO.style)))


def _rows(out: Path, split: str) -> list[dict]:
    return [json.loads(line) for line in (out / split / "metadata.jsonl").read_text().splitlines()]


def test_tiny_packages_from_end_to_end(cache, tmp_path, caplog):
    out = tmp_path / "icons"
    counts = building.build(out, cache, [NOTO, MONO, STREAMLINE], size=64, processes=1)
    rows = {split: _rows(out, split) for split in SPLITS}
    assert {split: len(found) for split, found in rows.items() if found} == dict(counts)
    everything = [row for found in rows.values() for row in found]
    # Skin tones, flags, hidden icons and the number alone are left out; an alias names the dog's face.
    subjects = {row["subject"] for row in everything}
    assert subjects == {"castle", "sunglasses", "fox", "horizontal traffic light", "letter a", "dog face"}
    for split, found in rows.items():
        for row in found:
            assert _read(out / split / row["file_name"]).shape == (64, 64, 4)
            assert {"text", "subject", "style", "source", "license"} <= row.keys()
            assert split_of(row["subject"], row["style"]) == split
    assert len({row["file_name"] for row in everything}) == len(everything)
    castles = [row for row in rows["train"] if row["subject"] == "castle"]
    assert Counter(row["style"] for row in castles if row["source"] == "fluent-mono") == {"single color icon": 6}
    styles = Counter(row["style"] for row in castles if row["source"] == "noto" and "tint" not in row["file_name"])
    assert styles == {style.name: 1 for style in (NOTO.style, *PAINTINGS.values())} | {"silhouette": 3}
    assert "1 of 9 drawings are broken or blank" in caplog.text
    text = (out / "LICENSES.md").read_text()
    assert f"| streamline | {STREAMLINE.package} | {STREAMLINE.version} | CC-BY-4.0 | 1 |" in text
    assert "https://creativecommons.org/licenses/by/4.0/" in text
    assert "Google Inc" in text


def test_a_second_build_draws_only_what_is_missing(cache, tmp_path):
    out = tmp_path / "icons"
    building.build(out, cache, [NOTO], size=64, processes=1)
    metadata = (out / "train" / "metadata.jsonl").read_bytes()
    files = sorted((out / "train" / "images").rglob("*.webp"))
    files[0].unlink()
    times = {path: path.stat().st_mtime_ns for path in files[1:]}
    content = files[1].read_bytes()
    building.build(out, cache, [NOTO], size=64, processes=1)
    assert files[0].exists()
    assert times == {path: path.stat().st_mtime_ns for path in files[1:]}
    assert (out / "train" / "metadata.jsonl").read_bytes() == metadata
    files[1].unlink()
    building.build(out, cache, [NOTO], size=64, processes=1)
    assert files[1].read_bytes() == content  # the same drawing and seed give the same bytes


def test_another_size_in_the_same_folder_is_refused(cache, tmp_path):
    building.build(tmp_path / "icons", cache, [MONO], size=64, processes=1)
    with pytest.raises(fetch.BuildError, match=r"holds a set built with .*64.*delete it"):
        building.build(tmp_path / "icons", cache, [MONO], size=32, processes=1)


def test_several_processes_draw_the_same(cache, tmp_path):
    for processes in (1, 2):
        building.build(tmp_path / str(processes), cache, [NOTO], size=64, processes=processes)
    one, two = (sorted((tmp_path / str(n)).rglob("*.webp")) for n in (1, 2))
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]


def test_country_flags_on_request(cache, lexicon):
    drawings = read_drawings(NOTO, cache / f"iconify-json-noto-{NOTO.version}", lexicon, flags=True)
    assert "flag of chad" in {drawing.subject.name for drawing in drawings}


# Clip art


def _clip(root: Path, place: str, title: str, *keywords: str) -> None:
    bag = "".join(f"<rdf:li>{keyword}</rdf:li>" for keyword in keywords)
    metadata = f'<metadata><cc:Work rdf:about=""><dc:title>{title}</dc:title>{bag}</cc:Work></metadata>'
    text = f'<svg>{metadata}<path id="{title}"/></svg>'
    path = root / "usr" / "share" / "openclipart" / "svg" / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_clip_art_with_sane_titles_is_kept(tmp_path, lexicon):
    _clip(tmp_path, "buildings/castle_01.svg", "Castle (colour)", "building", "old tower")
    _clip(tmp_path, "animals/fox_bw.svg", "Fox (B and W)", "animal")
    _clip(tmp_path, "unsorted/castle_01.svg", "Castle (colour)", "building", "old tower")  # the same drawing again
    _clip(tmp_path, "animals/fox_02.svg", "Clipart by Somebody - bee", "animal")  # a shared title: the file's name
    _clip(tmp_path, "animals/coniglio_01.svg", "Coniglio", "animal")
    _clip(tmp_path, "shapes/castle.svg", "Castle", "building")
    _clip(tmp_path, "unsorted/xx_01.svg", "Various Cliparts")
    found = list(clipart.read_folder(tmp_path, lexicon, Style("clip art")))
    assert [(path.name, subject.name, style.name) for path, _, subject, style in found] == [
        ("fox_02.svg", "fox", "clip art"),
        ("fox_bw.svg", "fox", "black and white clip art"),
        ("castle_01.svg", "castle", "clip art"),
    ]


# Errors


def test_without_npm_one_sentence_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(fetch.BuildError, match=r"npm, which is not installed: install Node\.js"):
        fetch.npm_package("@iconify-json/noto", "1.2.9", tmp_path)


def test_without_apt_the_source_is_left_out(cache, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    building.build(tmp_path / "icons", cache, [MONO, BY_NAME["openclipart"]], size=64, processes=1)
    assert "openclipart-svg is left out: it comes with apt-get and dpkg" in caplog.text
    assert "openclipart" not in (tmp_path / "icons" / "LICENSES.md").read_text()


def test_a_failing_npm_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: name)
    failed = subprocess.CompletedProcess([], 1, "", "npm error code E404\n")
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: failed)
    with pytest.raises(fetch.BuildError, match=r"npm pack @iconify-json/noto@9 failed \(npm error code E404\)"):
        fetch.npm_package("@iconify-json/noto", "9", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_archive_is_refused(tmp_path, monkeypatch):
    def pack(command, cwd, **kwargs):
        (Path(cwd) / "thing.tgz").write_bytes(b"not an archive")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr(subprocess, "run", pack)
    with pytest.raises(fetch.BuildError, match="is not a package archive"):
        fetch.npm_package("thing", "1", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_bad_packages_are_refused(cache, tmp_path):
    folder = cache / f"iconify-json-noto-{NOTO.version}"
    (folder / "icons.json").write_text("[]")
    with pytest.raises(fetch.BuildError, match="is not an Iconify set: delete the folder"):
        building.build(tmp_path / "icons", cache, [NOTO], size=64, processes=1)
    (folder / "icons.json").write_text('{"icons"')
    with pytest.raises(fetch.BuildError, match="cannot be read"):
        building.build(tmp_path / "icons", cache, [NOTO], size=64, processes=1)
    (folder / "package.json").write_text('{"version": "0"}')
    with pytest.raises(fetch.BuildError, match=f"holds version 0 and not {NOTO.version}"):
        building.build(tmp_path / "icons", cache, [NOTO], size=64, processes=1)


def test_unknown_sources_are_listed():
    assert select("") == select("all") == SOURCES
    assert [source.name for source in select("fluent-mono, noto")] == ["noto", "fluent-mono"]
    with pytest.raises(ValueError, match=r"--sources: unknown notto; the known ones are .*noto"):
        select("notto")


@pytest.mark.parametrize(
    ("flags", "code", "sentence"),
    [(["--sources=notto"], 2, "--sources: unknown notto"), (["--out=/dev/null"], 1, "--out /dev/null cannot be used")],
)
def test_command_line_errors_are_sentences(flags, code, sentence):
    # In a process of its own: flags of the same names may be defined by another command of the project.
    done = subprocess.run([sys.executable, "-m", "jaxdiff.data.icons", *flags], capture_output=True, text=True)
    assert done.returncode == code
    assert sentence in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_groups_have_emojibases_numbers():
    assert (FOOD, OBJECTS) == (4, 7)
