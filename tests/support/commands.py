"""Fixtures for the tests of commands: what a command line prints, and how often XLA compiles."""

import sys

import jax
import pytest

from jaxdiff.cli import sample, train

STEPS = "--steps=3"
CASTLE = "--prompt=a castle"


@pytest.fixture
def sample_cli(tiny_folder, tmp_path, monkeypatch, capsys, caplog):
    """Runs a command line in an empty folder: (exit code, lines of stdout, stderr with the warnings)."""
    monkeypatch.chdir(tmp_path)

    def run(*args, model=tiny_folder):
        caplog.clear()
        code = sample.main(["sample.py", f"--model={model}", *args])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return code, captured.out.splitlines(), captured.err + "\n".join(r.getMessage() for r in caplog.records)

    return run


@pytest.fixture
def train_cli(monkeypatch, capsys):
    """Runs a command line: (exit code, stdout, stderr)."""

    def run(*args) -> tuple[int, str, str]:
        argv = ["train.py", *map(str, args)]
        monkeypatch.setattr(sys, "argv", argv)  # where ml_collections looks for --config.…
        code = train.main(argv)
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return code, captured.out, captured.err

    return run


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
