"""Fixtures for the tests of commands: what a command line prints, and how often XLA compiles."""

import sys

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from jaxdiff.cli import sample, train

STEPS = "--steps=3"
CASTLE = "--prompt=a castle"


@pytest.fixture(scope="module")
def cache_home(tmp_path_factory):
    """A folder for compiled programs, in place of the user's."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def sample_cli(tiny_folder, tmp_path, monkeypatch, capsys, caplog, cache_home):
    """Runs a command line in an empty folder: (exit code, lines of stdout, stderr with the warnings)."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache_home))
    monkeypatch.chdir(tmp_path)
    before = jax.config.jax_compilation_cache_dir

    def run(*args, model=tiny_folder):
        caplog.clear()
        code = sample.main(["sample.py", f"--model={model}", *args])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return code, captured.out.splitlines(), captured.err + "\n".join(r.getMessage() for r in caplog.records)

    yield run
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.fixture
def train_cli(monkeypatch, capsys, cache_home):
    """Runs a command line: (exit code, stdout, stderr). Every program that is compiled is kept for the next one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache_home))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")  # of processes that a test starts
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    compilation_cache.reset_cache()  # JAX looks at the folder's name once

    def run(*args) -> tuple[int, str, str]:
        argv = ["train.py", *map(str, args)]
        monkeypatch.setattr(sys, "argv", argv)  # where ml_collections looks for --config.…
        code = train.main(argv)
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return code, captured.out, captured.err

    yield run
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture
def compilations():
    """Names of the programs that XLA has compiled since the test began."""
    names, listening = [], True

    def listener(event, seconds, **kwargs):
        if listening and event == "/jax/core/compile/backend_compile_duration":
            names.append(kwargs.get("fun_name"))

    jax.monitoring.register_event_duration_secs_listener(listener)
    yield names
    listening = False
