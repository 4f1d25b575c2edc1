"""Captions as people have them: metadata.jsonl, metadata.csv, a text file beside each image, kohya's folder names."""

import csv
import json

import pytest
from PIL import Image

from jaxdiff.config import ConfigError
from jaxdiff.data.captioned import open_source, source_files
from jaxdiff.data.filters import select
from jaxdiff.data.folder import examples
from jaxdiff.data.listing import uncaptioned
from jaxdiff.evaluation.images import find_images
from jaxdiff.training import dreambooth
from jaxdiff.training.defaults import base
from jaxdiff.training.options import OptionsError
from jaxdiff.training.run_data import Images, fingerprints
from jaxdiff.training.workdir import data_fingerprint


@pytest.fixture
def folder(tmp_path):
    """Writes a folder: images by their names, and other files with their text or bytes."""

    def write(*images, **texts):
        for name in images:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(tmp_path / name)
        for name, text in texts["texts"].items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return tmp_path

    return write


def captions(path, split="train", **columns):
    """The captions of each image by its name in the folder."""
    return {e.path.removeprefix(f"{path}/"): e.captions for e in examples(path, split, **columns)}


# --- text files


def test_a_text_file_beside_each_image(folder):
    texts = {
        "0.txt": "a cat\n",
        "1.caption": "\ufeffa dog, größer",
        "sub/2.TXT": "one\r\n\r\ntwo\r\n",
        "notes.txt": "x",
    }
    path = folder("0.png", "1.JPG", "sub/2.webp", ".hidden/3.png", texts=texts)
    assert captions(path) == {"0.png": ("a cat",), "1.JPG": ("a dog, größer",), "sub/2.webp": ("one", "two")}
    assert [p.name for p in source_files(path)] == ["0.txt", "1.caption", "2.TXT", "0.png", "1.JPG", "2.webp"]
    source = open_source(path)
    assert source.read(0).captions == ("a cat",)
    before = source.digest, data_fingerprint(path)
    (path / "0.txt").write_text("a cow")  # of the same size
    assert open_source(path).digest != before[0]
    assert data_fingerprint(path) != before[1]


def test_a_text_file_with_the_whole_name_of_the_image(folder):
    assert captions(folder("0.png", texts={"0.png.txt": "a cat"})) == {"0.png": ("a cat",)}


def test_a_caption_that_was_not_fetched(folder):
    with pytest.raises(ConfigError, match=r"0\.txt is a Git LFS pointer, not the file itself: fetch it again"):
        examples(folder("0.png", texts={"0.txt": "version https://git-lfs.github.com/spec/v1\n"}))


def test_folders_as_windows_separates_them(folder):
    table = "file_name,text\nsub\\0.png,a cat\n"
    (example,) = examples(folder("sub/0.png", texts={"metadata.csv": table}))
    assert example.path.endswith("/sub/0.png")
    with pytest.raises(ConfigError, match="lies outside of the folder"):
        examples(folder("0.png", texts={"metadata.csv": "file_name,text\n..\\0.png,a cat\n"}))


def test_missing_captions_are_counted_and_named(folder):
    path = folder(*(f"{i}.png" for i in range(6)), texts={"0.txt": "a cat"})
    with pytest.raises(
        ConfigError, match=r"^5 of 6 images in .* have no text file .*, such as 1.png, 2.png, 3.png, …:"
    ):
        examples(path)


def test_empty_captions_and_two_kinds_of_text_files_are_named(folder, caplog):
    path = folder("0.png", "1.png", texts={"0.txt": " \n", "1.txt": "x", "1.caption": "y"})
    assert captions(path) == {"0.png": ("",), "1.png": ("x",)}
    assert "1 of 2 captions in" in caplog.text
    assert "empty: 0.png." in caplog.text
    assert "text files of both kinds (1.png): .txt is read" in caplog.text


def test_text_that_is_no_utf8_is_named(folder):
    with pytest.raises(ConfigError, match=r"0\.txt is not UTF-8: save it as that"):
        examples(folder("0.png", texts={"0.txt": "a cat".encode("utf-16")}))
    with pytest.raises(ConfigError, match=r"metadata\.csv is not UTF-8"):
        examples(folder(texts={"metadata.csv": "file_name,text\n0.png,größer\n".encode("latin-1")}))


def test_splits_and_workdirs_in_a_folder_are_not_of_it(folder):
    texts = {"a.txt": "x", "validation/b.txt": "y", "run/run.json": "{}", "train.txt": ""}
    path = folder("a.png", "validation/b.png", "run/samples/step-000001.png", texts=texts)
    assert captions(path) == {"a.png": ("x",)}
    assert captions(path, "validation") == {"validation/b.png": ("y",)}
    with pytest.raises(ConfigError, match=r"has no test/metadata\.jsonl; its splits are validation"):
        examples(path, "test")


# --- which kind counts


def test_one_kind_counts_and_a_warning_names_it(folder, caplog):
    lines = {"metadata.jsonl": '{"file_name": "0.png", "text": "json"}', "metadata.csv": "file_name,text\n0.png,csv\n"}
    path = folder("0.png", texts={"0.txt": "text", **lines})
    assert captions(path) == {"0.png": ("json",)}
    assert "holds metadata.jsonl and metadata.csv: metadata.jsonl is read" in caplog.text
    assert "The text files beside the images" in caplog.text
    assert "are not read: metadata.jsonl has the captions" in caplog.text
    (path / "metadata.jsonl").unlink()
    assert captions(path) == {"0.png": ("csv",)}
    (path / "metadata.csv").unlink()
    caplog.clear()
    assert captions(path) == {"0.png": ("text",)}
    assert not caplog.text


def test_metadata_count_before_text_files_in_the_splits_folder(folder):
    texts = {"train/a.txt": "text", "metadata.jsonl": '{"file_name": "train/a.png", "text": "json"}'}
    assert captions(folder("train/a.png", texts=texts)) == {"train/a.png": ("json",)}


# --- metadata.csv


def test_a_table_as_spreadsheets_write_it(folder):
    rows = [["0.png", 'a "red" cat, sitting', "5.5", "2", "007"], ["sub/1.png", "two\nlines", "", "", "CC0"]]
    path = folder("0.png", "sub/1.png", texts={})
    with (path / "metadata.csv").open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows([["file_name", "text", "score", "repeats", "license"], *rows])
    found = examples(path)
    assert [e.captions for e in found] == [('a "red" cat, sitting',)] * 2 + [("two\nlines",)]
    assert found[0].extras == {"score": 5.5, "repeats": 2, "license": 7}
    assert found[2].extras == {"license": "CC0"}
    assert len(select(open_source(path), {"where": ("score>=5",)})) == 2
    assert len(select(open_source(path), {"where": ("license=CC0",)})) == 1


def test_a_table_of_parquet_as_folders_of_the_hub_have_it(folder, caplog):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path = folder("0.png", "sub/1.png", texts={})
    rows = {"file_name": ["0.png", "sub/1.png"], "caption": [["a cat", "a tom"], ["a dog"]], "score": [5.5, None]}
    pq.write_table(pa.table(rows), path / "metadata.parquet")
    assert captions(path) == {"0.png": ("a cat", "a tom"), "sub/1.png": ("a dog",)}
    assert [dict(e.extras) for e in examples(path)] == [{"score": 5.5}, {}]
    source = open_source(path)
    assert [source.read(i).captions for i in range(len(source))] == [("a cat", "a tom"), ("a dog",)]
    assert path / "metadata.parquet" in source_files(path)
    assert data_fingerprint(path)["files"] == 3
    assert not caplog.text
    pq.write_table(pa.table({"file_name": ["../0.png"], "text": ["a"]}), path / "metadata.parquet")
    with pytest.raises(ConfigError, match=r"metadata\.parquet, row 1: the image '\.\./0\.png' lies outside"):
        open_source(path)
    (path / "metadata.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ConfigError, match=r"metadata\.parquet (cannot be read|is damaged)"):
        open_source(path)


def test_a_cell_of_more_digits_than_python_reads_is_text(folder):
    content = f"file_name,text,id\n0.png,a,{'9' * 5000}\n"
    assert examples(folder("0.png", texts={"metadata.csv": content}))[0].extras == {"id": "9" * 5000}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"is empty: give it a line"),
        ("file_name,text\n", r"is empty: give it a line"),
        ("0.png,a cat\n", r"line 1 must name the columns, file_name and text, with commas between\."),
        ("file_name,text,text\n0.png,a,b\n", r"line 1 names the column 'text' twice: rename one"),
        ("file_name;text\n0.png;a\n", r"line 1 must name .* \(it has semicolons between them\)"),
        ("file_name\ttext\n0.png\ta\n", r"line 1 must name .* \(it has tabs between them\)"),
        ("file_name,text\n\n0.png,a cat, red\n", r"line 3 has 3 cells, the header 2: put a caption with commas"),
        ('file_name,text\n0.png,"a cat\n', r"line 2 cannot be read \(unexpected end of data\)"),
        ("file_name,words\n0.png,a\n", r'line 2 lacks "text"; it has file_name, words: .* data\.text_column'),
        ("file_name,text\n../0.png,a\n", r"line 2: the image '\.\./0\.png' lies outside"),
        ("file_name,text,repeats\n0.png,a,0\n", r'line 2: "repeats" must be a whole number from 1'),
    ],
)
def test_a_bad_table_names_the_line(folder, content, message):
    with pytest.raises(ConfigError, match=rf"metadata\.csv(, |).*{message}"):
        examples(folder("0.png", texts={"metadata.csv": content}))


# --- columns


def test_columns_may_be_named(folder):
    line = {"picture": "0.png", "caption": "usual", "mine": "named"}
    path = folder("0.png", texts={"metadata.jsonl": json.dumps(line)})
    assert captions(path, image_column="picture") == {"0.png": ("usual",)}
    assert captions(path, image_column="picture", text_column="mine") == {"0.png": ("named",)}
    with pytest.raises(ConfigError, match=r'lacks "other"; it has picture, caption, mine: .* data\.text_column'):
        examples(path, image_column="picture", text_column="other")
    with pytest.raises(ConfigError, match=r'lacks "file_name"; it has .*: .* data\.image_column'):
        examples(path)
    config = base()
    config.data.update({"path": str(path), "text_column": "mine", "image_column": "picture"})
    assert fingerprints(config)["files"] == 2
    assert Images(config, path / "run").split("train").read(0).captions == ("named",)
    (path / "metadata.jsonl").unlink()
    (path / "metadata.csv").write_text("picture,mine\n0.png,12\n")
    assert Images(config, path / "run").split("train").read(0).captions == ("12",)
    (path / "metadata.csv").rename(path / "0.txt")
    with pytest.raises(ConfigError, match=r"data\.text_column and data\.image_column name columns"):
        fingerprints(config)
    config.data.captions = ("for all",)  # which need no column
    assert Images(config, path / "run").split("train").read(0).captions == ("for all",)


# --- kohya's folders


def test_names_of_folders_as_kohyas_scripts_have_them(folder, caplog):
    path = folder("3_sks_dog/a.png", "3_sks_dog/b.png", "2023_trip/c.png", texts={"3_sks_dog/a.txt": "x"})
    with pytest.raises(ConfigError, match=r"1 of 3 images .* such as 2023_trip/c\.png"):
        examples(path)
    (path / "2023_trip" / "c.txt").write_text("y")
    found = [(e.path.rsplit("/", 1)[1], e.captions[0]) for e in examples(path)]
    assert found == [("c.png", "y"), *[("a.png", "x")] * 3, *[("b.png", "sks dog")] * 3]
    assert "Images of 3_sks_dog in" in caplog.text


def test_captions_of_the_config_reach_kohyas_folders_where_there_is_nothing_else(folder, caplog, tmp_path_factory):
    path = folder("2_sks dog/a.png", "other/b.png", texts={})
    made = dreambooth.write_captioned(path, ("mine",), tmp_path_factory.mktemp("run") / "captioned")
    assert [e.path.rsplit("/", 1)[1] for e in examples(made)] == ["a.png", "a.png"]
    assert {e.captions for e in examples(made)} == {("mine",)}
    assert data_fingerprint(path, captions=True)["files"] == 1
    assert "1 images in subfolders" in caplog.text
    Image.new("RGB", (8, 8)).save(path / "top.png")
    assert [p.name for p in uncaptioned(path)] == ["top.png"]  # as ever
    with pytest.raises(ConfigError, match="holds no image"):
        dreambooth.write_captioned(path / "nowhere", ("mine",), path / "made")


# --- what train.py and the evaluation make of them


def test_images_set_aside_are_not_trained_on(folder):
    path = folder("a.png", "mine/b.png", texts={"a.txt": "x", "mine/b.txt": "y"})
    config = base()
    config.data.update({"path": str(path), "eval_split": "mine"})
    with pytest.raises(
        OptionsError, match=r"^data\.eval_split mine: 2 of its files are trained on too, such as .*/b\."
    ):
        fingerprints(config)
    (path / "mine").rename(path / "validation")
    config.data.eval_split = "validation"
    assert fingerprints(config)["files"] == 2
    config.data.eval_split = "test"
    with pytest.raises(ConfigError, match="has no test/metadata"):
        fingerprints(config)


def test_images_set_aside_are_filtered_as_those_trained_on(tmp_path):
    for split, styles in {"train": "aabbc", "test": "cab"}.items():
        (tmp_path / split).mkdir()
        for i, style in enumerate(styles):
            Image.new("RGB", (8, 8)).save(tmp_path / split / f"{i}.png")
            line = {"file_name": f"{i}.png", "text": f"{style}{i}", "style": style, "subject": style}
            with (tmp_path / split / "metadata.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
    config = base()
    config.data.path = str(tmp_path)
    config.data.filter.style = ("b", "c")
    config.data.filter.max_subjects = 1
    images = Images(config, tmp_path / "run")
    assert [images.filtered("train").read(i).captions[0] for i in range(2)] == ["b2", "b3"]
    assert [images.filtered("test").read(i).captions[0] for i in range(2)] == ["c0", "b2"]
    config.data.filter.style = ("d",)
    with pytest.raises(ConfigError, match=r"data\.filter leaves no image of .*test"):
        images.filtered("test")


def test_the_evaluation_takes_them_too(folder):
    path = folder("a.png", "b.png", texts={"a.txt": "x", "b.txt": "y\nz"})
    assert find_images(path, None).prompts == ("x", "y")
    assert len(open_source(path, "train")) == 2
    (path / "metadata.csv").write_text("file_name,text,seed\nb.png,from a table,7\n")
    found = find_images(path, None)
    assert (found.prompts, found.seeds) == (("from a table",), (7,))
    with pytest.raises(ConfigError, match=r"have theirs in its metadata\.csv: leave --prompts out"):
        find_images(path, [])


def test_a_folder_that_cannot_be_read_is_named(folder, monkeypatch):
    path = folder("a.png", "sub/b.png", texts={"a.txt": "x"})

    def walk(top, onerror):
        onerror(PermissionError(13, "Permission denied", f"{top}/sub"))
        return iter(())

    monkeypatch.setattr("jaxdiff.data.listing.os.walk", walk)
    with pytest.raises(ConfigError, match=r"/sub cannot be read \(Permission denied\)"):
        examples(path)


@pytest.mark.parametrize("shard", ["x.tar", "x.parquet", "train-0.array_record"])
def test_images_beside_shards_are_named(folder, shard, caplog):
    """Whichever of the two is passed over."""
    root = folder("0.png", texts={"0.txt": "a cat"})
    (root / shard).touch()
    assert source_files(root) == [root / shard]
    assert f"{root} holds images beside {shard}, and these alone are read" in caplog.text
    caplog.clear()
    (root / "metadata.csv").write_text("file_name,text\n0.png,a cat\n")
    assert source_files(root) == [root / "metadata.csv", root / "0.png"]
    assert f"{root} holds {shard} beside the captions of images: the images alone are read" in caplog.text
    other = root / "validation"
    other.mkdir()
    (other / "y.tar").touch()
    (root / "metadata.csv").unlink()
    caplog.clear()
    assert source_files(root, "validation") == [other / "y.tar"]  # beside which there is none
    assert not caplog.records
