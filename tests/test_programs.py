"""Programs and shapes that an earlier process has kept: found without tracing, and never instead of others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdiff.sampling.generate
from jaxdiff.io import cache, programs
from jaxdiff.models.model import param_shapes


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "_folder", tmp_path)
    programs._programs.clear()
    return tmp_path


class Traced:
    """A jitted function that counts how often it is traced."""

    def __init__(self):
        self.count = 0

    def __call__(self, *args, key="key"):
        def function(x, y):
            self.count += 1
            return {"product": x @ y["w"], "nothing": None}

        programs._programs.clear()
        return programs.lookup(key, jax.jit(function), *args)(*args)["product"]


X, Y = np.arange(6, dtype=np.float32).reshape(2, 3), {"w": jnp.ones((3, 4))}


def test_a_program_is_traced_once_for_all_processes(folder):
    traced = Traced()
    expected = X @ np.ones((3, 4), np.float32)
    for times in (1, 1):
        np.testing.assert_array_equal(traced(X, Y), expected)
        assert traced.count == times
    assert len(list(folder.glob("program-*"))) == 1


def test_another_key_shape_type_setting_or_code_is_another_program(folder, monkeypatch):
    traced = Traced()
    traced(X, Y)
    traced(X, Y, key="other")
    traced(X[:1], Y)
    traced(X.astype(np.int32), Y)
    with jax.default_matmul_precision("highest"):
        traced(X, Y)
    monkeypatch.setattr(programs, "_code", lambda: ("changed",))
    programs._machine.cache_clear()
    traced(X, Y)
    programs._machine.cache_clear()
    assert traced.count == len(list(folder.glob("program-*"))) == 6


@pytest.mark.parametrize("content", [b"", b"no pickle", b"\x80\x04N."])
def test_a_damaged_file_is_written_again(folder, content, caplog):
    traced = Traced()
    traced(X, Y)
    (file,) = folder.glob("program-*")
    file.write_bytes(content)
    traced(X, Y)
    assert traced.count == 2
    assert "cannot be used" in caplog.text
    traced(X, Y)
    assert traced.count == 2


def test_a_process_compiles_once_where_nothing_can_be_kept(folder, monkeypatch):
    """As on a disk that is full."""
    monkeypatch.setattr(programs, "atomic_write", None)
    traced = Traced()

    def function(x, y):
        traced.count += 1
        return x @ y["w"]

    for _ in range(3):
        programs.lookup("key", jax.jit(function), X, Y)(X, Y)
    assert traced.count == 1
    assert not list(folder.iterdir())


def test_what_no_other_process_would_find_is_not_kept(folder, monkeypatch):
    traced = Traced()
    traced(X, Y, key=lambda: None)
    monkeypatch.setattr(cache, "_folder", None)
    traced(X, Y)
    assert traced.count == 2
    assert not list(folder.iterdir())


def test_shapes_are_kept(folder, tiny, monkeypatch):
    model, _ = tiny
    expected = param_shapes(model)
    assert programs.shapes(model) == expected
    monkeypatch.setattr(programs, "param_shapes", None)
    assert programs.shapes(model) == expected
    (file,) = folder.iterdir()
    file.write_text("{")
    monkeypatch.undo()
    monkeypatch.setattr(cache, "_folder", folder)
    assert programs.shapes(model) == expected
    assert file.read_text() != "{"


@pytest.mark.slow
def test_the_command_draws_the_same_image_untraced(sample_cli, tiny_folder, tmp_path, monkeypatch):
    args = [f"--model={tiny_folder}", "--prompt=a castle", "--steps=2", f"--cache_dir={tmp_path / 'kept'}"]
    monkeypatch.setattr(cache, "_folder", None)
    for name in ("first", "again"):
        programs._programs.clear()
        jaxdiff.sampling.generate.sampler.cache_clear()
        code, _, err = sample_cli(*args, f"--output={name}.png")
        assert code == 0, err
        monkeypatch.setattr(programs, "param_shapes", None)  # which nothing calls again
        monkeypatch.setattr("jaxdiff.sampling.generate.conditions", None)
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "first.png").read_bytes()
