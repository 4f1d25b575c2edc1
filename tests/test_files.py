"""Files appear whole or not at all, and nothing is left beside them."""

import contextlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from jaxdiff.files import atomic_write, replace_folder, write_text
from jaxdiff.io.modules import save_module


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


@pytest.mark.parametrize("same", [True, False])
def test_a_kill_while_a_network_is_saved_over_another_leaves_no_mixture(tmp_path, monkeypatch, same):
    """At each renaming and removal: the folder is the old one, the new one, or without weights, which is refused."""

    def save(value: int) -> tuple[bytes, bytes | None]:
        config = SimpleNamespace(to_dict=lambda: {"width": 0 if same else value})
        save_module(tmp_path / "a", SimpleNamespace(config=config), {"conv": {"bias": np.full(3, value, np.float32)}})
        return found()

    def found() -> tuple[bytes, bytes | None]:
        config, weights = (tmp_path / "a" / name for name in ("config.json", "diffusion_pytorch_model.safetensors"))
        return config.read_bytes(), weights.read_bytes() if weights.exists() else None

    whole = [save(1), save(2)]
    seen = []
    for moment in range(5):
        save(1)
        with monkeypatch.context() as m:
            left = iter(range(moment))

            def dying(real, left=left):
                def call(path, *args, **more):
                    removes_temporary = path.name.startswith(".") and not args
                    if not removes_temporary and next(left, None) is None:
                        raise KeyboardInterrupt
                    return real(path, *args, **more)

                return call

            for name in ("replace", "unlink"):
                m.setattr(Path, name, dying(getattr(Path, name)))
            with contextlib.suppress(KeyboardInterrupt):
                save(2)
        seen.append(found())
        assert seen[-1] in whole or (seen[-1][1] is None and not same)
    assert (seen[0], seen[-1]) == (whole[0], whole[1])
