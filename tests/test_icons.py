"""The builder of the icons set, without the network: a tiny package stands in for the real ones."""

import gzip
import io
import json
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("cv2")
pytest.importorskip("resvg_py")

from datasets.icons import build as building
from datasets.icons import clipart, fetch
from datasets.icons.drawings import read_drawings
from datasets.icons.lexicon import FOOD, OBJECTS, Lexicon, Subject
from datasets.icons.sources import PAINTINGS, SOURCES, Style, select
from datasets.icons.splits import SPLITS, split_of
from datasets.icons.variants import image_specs
from tests.support.icons import BY_NAME, DISC, MONO, MONO_DISC, NOTO, STREAMLINE, read_pixels

ROOT = Path(__file__).parent.parent

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


# The lexicon


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


def test_groups_have_emojibases_numbers():
    assert (FOOD, OBJECTS) == (4, 7)


# The build


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
            assert read_pixels(out / split / row["file_name"]).shape == (64, 64, 4)
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


def test_of_an_icon_set_only_known_things_are_taken(cache, lexicon):
    """By their name, by what people call them, and without what tells variants apart; for captions with a style."""
    source = BY_NAME["mingcute"]
    names = ("castle-fill", "castle-2-fill", "castle-line", "sunglasses-fill", "add-fill", "apple-fill", "fox")
    icons = {"icons.json": {"icons": {name: {"body": MONO_DISC} for name in names}}}
    folder = _package(cache / "mingcute", source.version, icons)
    drawings = read_drawings(source, folder, lexicon)
    assert [(d.name, d.subject.name) for d in drawings] == [
        ("castle-2-fill", "castle"), ("castle-fill", "castle"), ("sunglasses-fill", "sunglasses"),
    ]  # fmt: skip
    specs = image_specs(drawings[0])
    assert specs[0].color == "black"
    assert len({spec.color for spec in specs}) == source.recolor == 2
    assert all("castle" not in spec.text and "a castle" not in spec.text for spec in specs)


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


def _archive() -> bytes:
    """An npm package, stored without compression, so that one byte can be damaged."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name in ("package/package.json", "package/icons.json"):
            info = tarfile.TarInfo(name)
            info.size = 2
            tar.addfile(info, io.BytesIO(b"{}"))
    return gzip.compress(file.getvalue(), compresslevel=0)


@pytest.mark.parametrize(
    "content",
    [
        b"not an archive",
        _archive()[:900],
        _archive().replace(b"package/icons.json", b"package/i?ons.json"),  # a header whose checksum is wrong
    ],
)
def test_what_is_no_archive_is_refused(tmp_path, monkeypatch, content):
    def pack(command, cwd, **kwargs):
        (Path(cwd) / "thing.tgz").write_bytes(content)
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
    done = subprocess.run([sys.executable, "-m", "datasets.icons", *flags], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code
    assert sentence in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
