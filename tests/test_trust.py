"""What may befall a run: kills, damaged checkpoints, full disks, other devices."""

import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.io.pretrained import save
from jaxdiff.training import checkpoint, remote, together
from jaxdiff.training.checkpoint import SUMS, CheckpointError, Checkpoints, damage
from jaxdiff.training.digests import UNCHECKED
from jaxdiff.training.ema import Snapshots
from jaxdiff.training.loop import fit
from jaxdiff.training.trackers import JsonLines, TrackedImages
from jaxdiff.training.workdir import WorkdirError, claimed, lock
from tests.support import fit_line
from tests.support.batches import FromMemory
from tests.support.line import LINE, line_data, linear_stage, one_device, same
from tests.support.processes import CONFIG, ROOT, finish, free_port, start
from tests.support.stages import options, whole_model
from tests.support.tiny import tiny_params
from tests.support.train_on_hosts import write_images
from tests.support.written import write_squares


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_squares(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A model to start from: to compile what draws random parameters takes longer than a step."""
    folder = tmp_path_factory.mktemp("model") / "whole"
    save(folder, whole_model(), tiny_params(whole_model()))
    return folder


# --- kill -9


class Runs(NamedTuple):
    """A program that trains, and can be killed."""

    steps: int
    command: Callable[[Path], list[str]]  # of a workdir: what Python is started with
    finish: Callable[[Path], bytes]  # lets the same run end in this process; what is learned at the end

    def kill(self, workdir: Path, wish, delay: float) -> list[dict]:
        """Kill -9 a while after `wish()` is true; the metrics of before."""
        process = subprocess.Popen(
            [sys.executable, *self.command(workdir)], cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            deadline = time.monotonic() + 300
            while process.poll() is None and not wish():
                assert time.monotonic() < deadline
                time.sleep(0.002)
            time.sleep(delay)
            assert process.poll() is None, process.stderr.read()
        finally:
            process.kill()
            process.communicate()
        return metrics(workdir)


def line_runs(steps: int) -> Runs:
    """`fit` alone, of a stage that compiles in no time."""
    return Runs(
        steps,
        lambda workdir: ["-m", "tests.support.fit_line", str(workdir), str(steps)],
        lambda workdir: fit_line.run(workdir, steps),
    )


def command_runs(stage: str, data: Path, model: Path, steps: int, train_cli) -> Runs:
    """A command line of train.py; both processes find the programs that either compiled."""
    settings = {"steps": steps, "log_every": 1, "checkpoint_every": 3, "data.path": data, "data.flip": True}
    settings["init_from.model"] = model
    flags = [f"--config={CONFIG}:{stage}", *(f"--config.{k}={v}" for k, v in settings.items())]

    def finish(workdir: Path) -> bytes:
        code, _, error = train_cli(*flags, f"--workdir={workdir}")
        assert code == 0, error
        return (workdir / "export" / "text_encoder" / "model.safetensors").read_bytes()

    return Runs(steps, lambda workdir: ["train.py", *flags, f"--workdir={workdir}"], finish)


def metrics(workdir: Path) -> list[dict]:
    """What two runs must have in common, by step; the last line may be half written."""
    file = workdir / "metrics.jsonl"
    text = file.read_text() if file.exists() else ""
    lines = [json.loads(line) for line in text.split("\n")[:-1]]
    return [{k: line[k] for k in ("step", "loss", "grad_norm")} for line in lines if "loss" in line]


def check_kills(runs: Runs, tmp_path: Path, moments: list[str], seed: int) -> None:
    """Kill a run at these moments, then let it end: each loss ever written is that of a run that nobody killed."""
    learned = runs.finish(tmp_path / "unbroken")
    unbroken = metrics(tmp_path / "unbroken")
    assert [line["step"] for line in unbroken] == list(range(1, runs.steps + 1))
    rng, workdir, reached = random.Random(seed), tmp_path / "killed", 0
    for i, moment in enumerate(moments):
        aim = rng.randint(reached + 1, max(reached + 1, (i + 1) * runs.steps // (len(moments) + 1)))

        def far() -> bool:
            seen = metrics(workdir)
            return bool(seen) and seen[-1]["step"] >= aim  # noqa: B023

        def writing() -> bool:
            return any((workdir / "checkpoints").glob("*tmp*")) and far()

        seen = runs.kill(workdir, {"start": lambda: True, "step": far, "write": writing}[moment], rng.random() * 0.01)
        assert seen == unbroken[: len(seen)], moment
        left = [p.name for p in (workdir / "checkpoints").glob("*tmp*")]
        print(f"kill {i}: {moment}, at step {len(seen)}, half-written: {left}")
        reached = max(reached, len(seen))
    assert runs.finish(workdir) == learned
    assert metrics(workdir) == unbroken


def test_a_killed_run_goes_on_as_if_nothing_had_been(tmp_path):
    check_kills(line_runs(30), tmp_path, ["write"], seed=0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # by which ml_collections loads configs
@pytest.mark.parametrize(
    ("stage", "steps", "moments"),
    [
        ("clip", 16, ["write"]),
        ("unet", 120, ["start", "step", "write", "step", "write", "step", "step", "write", "step", "write"]),
    ],
)
def test_a_killed_command_goes_on_as_if_nothing_had_been(stage, steps, moments, data, model, tmp_path, train_cli):
    check_kills(command_runs(stage, data, model, steps, train_cli), tmp_path, moments, seed=steps // 100)


# --- checkpoints


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A folder with the checkpoints 1, 2 and 3. Not to be written to."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    with Checkpoints(folder, keep=3) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, tree(step), {"next": step})
    return folder


def tree(step: int) -> dict:
    rng = np.random.default_rng(step)
    return {"w": jnp.asarray(rng.normal(size=(64, 100)), jnp.float32), "step": jnp.int32(step)}


def spoil(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


@pytest.mark.parametrize("how", ["missing", "truncated", "flipped"])
def test_every_damage_of_any_file_is_noticed(written, tmp_path, how):
    files = [p.relative_to(written / "3") for p in (written / "3").rglob("*") if p.is_file()]
    files = [p for p in files if str(p) not in UNCHECKED or p.name == SUMS]
    assert damage(written / "3") is None
    assert len(files) > 5
    for file in files:
        shutil.copytree(written / "3", tmp_path / "3")
        spoil(tmp_path / "3" / file, how)
        assert str(file) in damage(tmp_path / "3")
        shutil.rmtree(tmp_path / "3")


def test_the_newest_intact_checkpoint_is_used_and_the_damaged_ones_named(written, tmp_path, caplog):
    shutil.copytree(written, tmp_path / "c")
    largest = max((tmp_path / "c" / "3").rglob("*"), key=lambda p: p.is_file() and p.stat().st_size)
    spoil(largest, "flipped")  # orbax restores other numbers and says nothing
    spoil(tmp_path / "c" / "2" / "data" / "metadata", "truncated")
    (tmp_path / "c" / "4.orbax-checkpoint-tmp" / "state").mkdir(parents=True)  # a kill in the middle of writing
    with Checkpoints(tmp_path / "c", keep=3) as checkpoints:
        assert checkpoints.latest == 1
        state, position = checkpoints.restore(tree(0))
        assert same(state, tree(1))
        assert position == {"next": 1}
        for name in (largest.name, "data/metadata", "damaged-3", "damaged-2"):
            assert name in caplog.text
        for step in (2, 3):
            checkpoints.save(step, tree(step), {"next": step})
    assert {p.name for p in (tmp_path / "c").iterdir()} == {"1", "2", "3", "damaged-2", "damaged-3"}


def test_no_run_begins_anew_over_damaged_checkpoints(written, tmp_path):
    for step in ("1", "2"):
        shutil.copytree(written / step, tmp_path / step)
        spoil(tmp_path / step / SUMS, "truncated")
    with pytest.raises(CheckpointError, match=r"no intact checkpoint \(2: sha256.json .*; 1: sha256.json"):
        Checkpoints(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"1", "2"}


def test_a_full_disk_ends_the_run_in_a_sentence_and_the_last_checkpoint_stays(tmp_path, monkeypatch):
    def run(steps):
        o = options(steps=steps, batch_size=3, checkpoint_every=2, schedule="constant")
        return fit(linear_stage(), LINE, FromMemory(line_data(), 3, 7), o, tmp_path / "a", mesh=one_device())

    run(4)

    def full(folder):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(checkpoint, "digests", lambda folder, real=checkpoint.digests: (
            full(folder) if "tmp" in folder.name else real(folder)
        ))  # fmt: skip
        with pytest.raises(CheckpointError, match=r"checkpoints/6 cannot be written \(No space left on device\): free"):
            run(8)
    with Checkpoints(tmp_path / "a" / "checkpoints") as checkpoints:
        assert checkpoints.latest == 4
    o = options(steps=8, batch_size=3, schedule="constant")
    unbroken = fit(linear_stage(), LINE, FromMemory(line_data(), 3, 7), o, tmp_path / "b", mesh=one_device())
    assert same(run(8), unbroken)


# Writes of tensorstore that come after the refused one find nobody waiting for them.
@pytest.mark.filterwarnings("ignore:Exception ignored in. None:pytest.PytestUnraisableExceptionWarning")
def test_what_the_system_refuses_to_write_leaves_the_last_checkpoint(written, tmp_path):
    """As on a full disk, the system itself says no in the middle of a file."""
    shutil.copytree(written, tmp_path / "c")

    def save() -> None:
        before, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        with Checkpoints(tmp_path / "c") as checkpoints:
            resource.setrlimit(resource.RLIMIT_FSIZE, (16_384, hard))  # bytes; the numbers take 25,600
            try:
                checkpoints.save(4, tree(4), {"next": 4})
                checkpoints.save(5, tree(5), {"next": 5})  # waits for the one before
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (before, hard))

    with pytest.raises(CheckpointError, match=r"c/4 cannot be written \(.*File too large.*\): free space"):
        save()
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.latest == 3
        assert same(checkpoints.restore(tree(0))[0], tree(3))


def test_what_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file/checkpoints cannot be written"):
        Checkpoints(tmp_path / "file" / "checkpoints")
    with pytest.raises(WorkdirError, match="file/lock cannot be written"):
        lock(tmp_path / "file").__enter__()
    with pytest.raises(WorkdirError, match="cannot be written"):
        JsonLines(tmp_path / "file" / "metrics.jsonl", 0)


# --- devices and hosts


@pytest.mark.slow
def test_other_devices_and_meshes_go_on(tmp_path):
    finish(start("tests.support.train_on_meshes", tmp_path, devices=4))
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["devices"] == [1, 4, 2]
    assert report["restored"] == [True, True]  # bit for bit, and divided as the new mesh says
    # Sums in another order, by nine of Adam's updates.
    np.testing.assert_allclose(report["losses"], report["unbroken"], rtol=1e-4)


@pytest.mark.slow
def test_a_notice_to_one_host_stops_all_at_the_same_step(tmp_path):
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    data = write_images(tmp_path / "data")
    processes = [start("tests.support.train_on_hosts", port, i, 2, data, tmp_path, 10**6, devices=1) for i in range(2)]
    while not metrics(tmp_path) and all(p.poll() is None for p in processes):
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)
    finish(*processes)
    stopped = {int(np.load(tmp_path / f"result-{i}.npz")["step"]) for i in range(2)}
    assert len(stopped) == 1
    assert stopped.pop() == max(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()) < 10**6


@pytest.mark.parametrize("killed", [4, 6])
@pytest.mark.parametrize("shown", [{"score": 0.5}, {"samples": TrackedImages(np.zeros((1, 8, 8, 3), np.uint8))}])
def test_what_a_kill_behind_a_checkpoint_left_out_is_made_up_for(tmp_path, monkeypatch, killed, shown):
    """The evaluation and the snapshot of averages of that step, once."""

    def run(folder, seen):
        o = options(steps=6, batch_size=3, checkpoint_every=2, eval_every=4, ema_sigmas=(0.1,), snapshot_every=4)
        return fit(
            linear_stage(), LINE, FromMemory(line_data(), 3, 7), o, tmp_path / folder, mesh=one_device(),
            on_eval=lambda step, params: seen.append((step, params["line"]["w"].tolist())) or shown,
        )  # fmt: skip

    def snapshots(folder):
        return {p.name: p.read_bytes() for p in (tmp_path / folder / "ema").iterdir()}

    unbroken: list = []
    whole = run("a", unbroken)
    assert [step for step, _ in unbroken] == [0, 4, 6]

    def save(self, opt_state, real=Snapshots.save):
        if int(opt_state[-1].updates) == killed:
            raise KeyboardInterrupt
        real(self, opt_state)

    broken: list = []
    with monkeypatch.context() as m:
        m.setattr(Snapshots, "save", save)
        with pytest.raises(KeyboardInterrupt):
            run("b", broken)
    assert same(run("b", broken), whole)
    assert broken == unbroken
    assert snapshots("b") == snapshots("a")
    run("b", broken)
    assert broken == unbroken  # nothing twice


# --- a host that fails


@pytest.mark.parametrize("opens", ["checkpoints", "claimed", "held"])
def test_an_error_of_another_host_is_raised_here(tmp_path, memory, monkeypatch, opens):
    """Each host would wait for the others, who never come."""
    opened = {
        "checkpoints": lambda: Checkpoints(tmp_path / "run" / "checkpoints"),
        "claimed": lambda: claimed(tmp_path / "run"),
        "held": lambda: remote.held(remote.workdir(f"{memory}/run")),
    }[opens]
    with monkeypatch.context() as m:
        m.setattr(together, "gather", lambda own: [own, "The disk is full."])
        with pytest.raises(together.HostError, match=r"^Process 1 of 2 has failed: The disk is full\.$"):
            opened().__enter__()
    with opened():  # no lock is left
        pass


def test_an_error_of_this_host_is_told_to_the_others(monkeypatch):
    told = []
    monkeypatch.setattr(together, "gather", lambda own: told.append(own) or [None, own])
    with pytest.raises(OSError, match="full"), together.together():
        raise OSError("the disk\nis full")
    with together.together():
        pass
    assert told == ["the disk is full", None]


@pytest.mark.slow
def test_a_host_that_finds_no_intact_checkpoint_ends_the_others_too(tmp_path):
    damaged = tmp_path / "checkpoints" / "4"
    damaged.mkdir(parents=True)
    (damaged / SUMS).write_text("{}")
    (damaged / "state").write_text("half")
    port = free_port()
    both = [start("tests.support.checkpoint_on_hosts", port, i, 2, tmp_path, devices=1) for i in range(2)]
    try:
        first, second = (process.communicate(timeout=240)[0] for process in both)
    finally:
        for process in both:
            process.kill()
    sentence = f"{tmp_path}/checkpoints holds no intact checkpoint (4: state holds other bytes"
    assert f"CheckpointError: {sentence}" in first
    assert f"HostError: Process 0 of 2 has failed: {sentence}" in second
