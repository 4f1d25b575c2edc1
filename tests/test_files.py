"""Files appear whole or not at all, and nothing is left beside them."""

import pytest

from jaxdiff.files import atomic_write, replace_folder, write_text


def test_a_file_has_its_name_only_once_it_is_written(tmp_path):
    path = tmp_path / "report.json"
    write_text(path, "old")
    with atomic_write(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert temporary.parent == tmp_path  # on one file system, where renaming is one step
        assert temporary.name.startswith(".")
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_an_error_while_writing_keeps_the_earlier_file(tmp_path):
    path = tmp_path / "report.json"
    write_text(path, "old")

    def write():
        with atomic_write(path) as temporary:
            temporary.write_text("ne")
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        write()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_two_writers_of_one_file_do_not_share_a_temporary_name(tmp_path):
    path = tmp_path / "report.json"
    with atomic_write(path) as first, atomic_write(path) as second:
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"  # whose block ended last
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_a_name_as_long_as_the_file_system_allows_can_be_written(tmp_path):
    path = tmp_path / ("x" * 255)
    write_text(path, "text")
    assert path.read_text() == "text"


def test_a_folder_is_replaced_or_stays(tmp_path):
    folder, new, old = tmp_path / "model", tmp_path / "new", tmp_path / "old"
    folder.mkdir()
    write_text(folder / "a", "old")
    with pytest.raises(FileNotFoundError):
        replace_folder(folder, new, old)  # there is no new one
    assert (folder / "a").read_text() == "old"
    new.mkdir()
    write_text(new / "a", "new")
    replace_folder(folder, new, old)
    assert ((folder / "a").read_text(), (old / "a").read_text()) == ("new", "old")
    assert not new.exists()
