"""Fixtures for the tests of commands: what a command line prints, and how often XLA compiles."""

import sys
from pathlib import Path

import jax
import pytest

from jaxdiff.cli import sample, train
from jaxdiff.evaluation import command
from tests.support import evaluation_folders

STEPS = "--steps=3"
CASTLE = "--prompt=a castle"


@pytest.fixture
def sample_cli(tiny_folder, tmp_path, monkeypatch, capsys, caplog):
    """Runs a command line in an empty folder: (exit code, lines of stdout, stderr with the warnings)."""
    monkeypatch.chdir(tmp_path)

    def run(*args, model=tiny_folder):
        caplog.clear()
        code = sample.main(["sample.py", *([] if model is None else [f"--model={model}"]), *args])
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


@pytest.fixture(scope="session")
def made_transformers(tmp_path_factory):
    """Small pipelines of the transformer families, for tests that have asked for torch and diffusers."""
    from tests.support.transformer_pipelines import Made

    return Made(tmp_path_factory)


@pytest.fixture(scope="session")
def clip_and_data(tmp_path_factory):
    """A folder with an encoder and data, for features that are kept. Not to be written to but by their cache."""
    folder = tmp_path_factory.mktemp("evaluation")
    evaluation_folders.clip_model_folder(folder / "clip")
    evaluation_folders.data_folder(folder / "data")
    return folder


@pytest.fixture
def evaluation_cli(clip_and_data, tiny_folder, tmp_path, monkeypatch, capsys, caplog):
    """Runs a command line in a folder with a file of prompts: (exit code, stdout, stderr with the warnings)."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(clip_and_data / "cache"))  # where features are kept
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("\n".join(evaluation_folders.PROMPTS))

    def run(*args, model=tiny_folder, encoder=clip_and_data / "clip"):
        caplog.clear()
        own = [f"--{k}={v}" for k, v in (("model", model), ("encoder", encoder)) if v is not None]
        code = command.main(["evaluation", *own, *args])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return code, captured.out, captured.err + "\n".join(r.getMessage() for r in caplog.records)

    return run


@pytest.fixture
def compilations():
    """Names of the programs that XLA has compiled since the test began."""
    names, listening = [], True

    def listener(event, seconds, **kwargs):
        if listening and event == "/jax/core/compile/backend_compile_duration":
            names.append(kwargs.get("fun_name"))

    jax.monitoring.register_event_duration_secs_listener(listener)
    jax.jit(lambda x: x + 1)(1)
    assert names  # else the event has another name
    names.clear()
    yield names
    listening = False
