"""Runs whose folder lies in an object store: on new machines, on several hosts, killed, and while the store fails."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import jaxdiff
from jaxdiff import stores
from jaxdiff.training import remote, remote_checkpoints
from jaxdiff.training.checkpoint import CheckpointError, Checkpoints
from jaxdiff.training.loop import fit
from tests.support import checkpoint_on_hosts
from tests.support.batches import FromMemory
from tests.support.line import LINE, line_data, linear_stage, one_device, same
from tests.support.processes import CONFIG, ROOT, finish, free_port, start
from tests.support.stages import options, whole_model
from tests.support.tiny import tiny_params
from tests.support.written import files, write_squares


def run(url: str, steps: int, **more):
    """Train for so many steps on this machine, a checkpoint every other step."""
    o = options(steps=steps, batch_size=3, checkpoint_every=2, schedule="constant", **more)
    return fit(linear_stage(), LINE, FromMemory(line_data(), 3, 7), o, remote.workdir(url), mesh=one_device())


def steps_of(url: str) -> list[int]:
    return remote_checkpoints.complete_steps(f"{url}/checkpoints")


@pytest.mark.slow
def test_a_run_goes_on_from_the_newest_whole_checkpoint_on_a_new_machine(bucket, tmp_path, machine, caplog):
    url = f"{bucket}/run"
    caplog.set_level("INFO", logger="absl")
    unbroken = run(str(tmp_path / "unbroken"), 8)
    run(url, 6)
    assert steps_of(url) == [6, 4]
    stores.write(f"{url}/checkpoints/8/state/half", b"a kill in the middle of uploading")
    first = machine()
    assert same(run(url, 8), unbroken)
    assert "Copying the checkpoint" in caplog.text
    assert steps_of(url) == [8, 6]
    assert not stores.exists(f"{url}/checkpoints/8/state/half")
    assert sorted(p.name for p in first.rglob("checkpoints/*")) == ["8"]


@pytest.mark.parametrize("how", ["missing", "other"])
def test_a_damaged_checkpoint_is_renamed_and_the_one_before_is_used(memory, tmp_path, machine, caplog, how):
    url = f"{memory}/run"
    unbroken = run(str(tmp_path / "unbroken"), 6)
    run(url, 4)
    name = max(stores.listing(f"{url}/checkpoints/4"), key=lambda name: "/d/" in name)
    stores.remove(f"{url}/checkpoints/4/{name}")
    if how == "other":
        stores.write(f"{url}/checkpoints/4/{name}", b"other bytes")
    machine()
    assert same(run(url, 6), unbroken)
    assert f"{url}/checkpoints/4 is damaged ({name}" in caplog.text
    assert "renamed to damaged-4" in caplog.text
    assert steps_of(url) == [6, 4]
    assert stores.listing(f"{url}/checkpoints/damaged-4")
    for step in (4, 6):
        stores.write(f"{url}/checkpoints/{step}/sha256.json", b"{}")
    machine()
    with pytest.raises(CheckpointError, match=rf"{url}/checkpoints holds no intact checkpoint \(6: .*; 4: "):
        run(url, 8)


def test_what_this_machine_left_of_another_run_is_not_uploaded(memory, tmp_path):
    url = f"{memory}/run"
    run(url, 4)
    with remote.held(remote.workdir(url)) as begin:
        begin()
        (remote.workdir(url) / "metrics.jsonl").write_text("{}\n")
    for name in stores.listing(url):
        stores.remove(f"{url}/{name}")  # the user begins anew
    with remote.held(remote.workdir(url)) as begin:
        begin()
        assert not (remote.workdir(url) / "metrics.jsonl").exists()
    assert stores.listing(url) == {}
    unbroken = run(str(tmp_path / "unbroken"), 2)
    assert same(run(url, 2), unbroken)


def test_numbers_of_before_a_checkpoint_are_in_the_store_when_it_is_whole(memory, monkeypatch):
    """A kill then loses none of them."""
    url, seen, real = f"{memory}/run", [], stores.write

    def write(name, data, **more):
        if name.endswith("checkpoints/4/sha256.json"):
            seen.append(stores.read(f"{url}/metrics.jsonl"))
        real(name, data, **more)

    monkeypatch.setattr(stores, "write", write)
    with remote.held(remote.workdir(url)) as begin:
        begin()
        run(url, 4)
    assert [json.loads(line)["step"] for line in seen[0].splitlines()] == [1, 2, 3, 4]


def test_a_file_that_another_program_removes_meanwhile_does_not_end_the_run(memory, monkeypatch):
    """Weights & Biases keeps files of its own in the workdir, and removes them when it likes."""
    url, real = f"{memory}/run", stores.put
    folder = remote.workdir(url)

    def put(path, to):
        path.unlink() if path.name == "short-lived" else None
        real(path, to)

    monkeypatch.setattr(stores, "put", put)
    with remote.held(folder) as begin:
        (folder / "wandb").mkdir()
        (folder / "wandb" / "short-lived").write_text("x")
        (folder / "wandb" / "kept").write_text("x")
        begin()
    assert list(stores.listing(f"{url}/wandb")) == ["kept"]


@pytest.mark.slow
def test_hosts_without_a_common_folder_write_one_checkpoint(s3, machine):
    """Each its part of the arrays; any number of hosts goes on from it."""
    url, port = f"{s3[0]}/run", free_port()
    for _ in range(2):
        machine()
        both = [start("tests.support.checkpoint_on_hosts", port, i, 2, url, devices=2) for i in range(2)]
        finish(*both)
    assert steps_of(url) == [4, 3]
    assert not [name for name in stores.listing(f"{url}/checkpoints") if ".json." in name]
    machine()
    with Checkpoints(remote.workdir(url) / "checkpoints") as checkpoints:
        assert checkpoints.latest == 4
        with pytest.raises(CheckpointError, match="was written by 2 hosts, each at its own position"):
            checkpoints.restore(checkpoint_on_hosts.state(0))
    stores.write(f"{url}/checkpoints/4/data/metadata", b'{"hosts": [{"next": 7}, {"next": 7}]}')
    sums = json.loads(stores.read(f"{url}/checkpoints/4/sha256.json"))
    sums["data/metadata"] = hashlib.sha256(stores.read(f"{url}/checkpoints/4/data/metadata")).hexdigest()
    stores.write(f"{url}/checkpoints/4/sha256.json", json.dumps(sums).encode())
    machine()
    with Checkpoints(remote.workdir(url) / "checkpoints") as checkpoints:
        found, position = checkpoints.restore(checkpoint_on_hosts.state(0))
    assert position == {"next": 7}
    assert same(found, checkpoint_on_hosts.state(4))


# --- train.py


@pytest.fixture(scope="module")
def starting_point(tmp_path_factory) -> Path:
    """A folder with data, and a model to start from."""
    folder = tmp_path_factory.mktemp("start")
    (folder / "data").mkdir()
    write_squares(folder / "data")
    jaxdiff.save(folder / "model", whole_model(), tiny_params(whole_model()))
    return folder


def flags(steps: int, start: str | Path, workdir: str | Path) -> list[str]:
    settings = {
        "steps": steps,
        "log_every": 1,
        "checkpoint_every": 2,
        "schedule": "constant",
        "data.path": f"{start}/data",
    }
    settings |= {"data.path": f"{start}/data", "init_from.model": f"{start}/model"}
    return [f"--config={CONFIG}:clip", f"--workdir={workdir}", *(f"--config.{k}={v}" for k, v in settings.items())]


def losses(data: bytes) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in data.decode().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def put_all(folder: Path, url: str) -> None:
    stores.upload(folder, url, stores.files(folder))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # by which ml_collections loads configs
def test_train_py_reads_and_writes_stores(s3, starting_point, tmp_path, machine, train_cli):
    bucket = s3[0]
    url = f"{bucket}/runs/clip"
    put_all(starting_point, f"{bucket}/start")
    code, _, error = train_cli(*flags(6, starting_point, tmp_path / "unbroken"))
    assert code == 0, error
    code, _, error = train_cli(*flags(4, f"{bucket}/start", url))
    assert code == 0, error
    stored = json.loads(stores.read(f"{url}/run.json"))["config"]
    assert stored["data"]["path"] == f"{bucket}/start/data"
    assert stored["init_from"]["model"] == f"{bucket}/start/model"
    machine()
    code, _, error = train_cli(*flags(6, f"{bucket}/start", url), "--config.learning_rate=0.5")
    assert code == 1
    assert f"{url} belongs to another config (learning_rate: 0.001 -> 0.5)" in error
    machine()
    code, _, error = train_cli(*flags(6, f"{bucket}/start", url))
    assert code == 0, error
    assert losses(stores.read(f"{url}/metrics.jsonl")) == losses((tmp_path / "unbroken/metrics.jsonl").read_bytes())
    found = {name.split("/")[0] for name in stores.listing(url)}
    assert {"run.json", "metrics.jsonl", "tb", "checkpoints", "export"} <= found
    assert not stores.exists(f"{url}/lock")
    machine()
    export = stores.fetch(f"{url}/export")
    assert files(export) == files(tmp_path / "unbroken" / "export")
    assert not Path("s3:").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_a_run_killed_at_any_request_goes_on_as_if_nothing_had_been(s3, starting_point, tmp_path, machine, train_cli):
    """Kill -9 as the store is asked for something, each time followed by a machine whose disk is new."""
    bucket, application = s3
    url = f"{bucket}/run"
    assert train_cli(*flags(12, starting_point, tmp_path / "unbroken"))[0] == 0
    moments = [
        ("PUT", "/run/lock"), ("PUT", "/run/run.json"), ("PUT", "/checkpoints/2/"),
        ("PUT", "/checkpoints/4/sha256.json"),
        ("DELETE", "/checkpoints/2/sha256.json"), ("DELETE", "/checkpoints/4/state"), ("PUT", "/checkpoints/10/state"),
        ("GET", "/checkpoints/8/"), ("PUT", "/checkpoints/12/sha256.json"), ("PUT", "/export/"),
    ]  # fmt: skip
    reached = 0
    for method, part in moments:
        machine()
        program = subprocess.Popen(
            [sys.executable, "train.py", *flags(12, starting_point, url)],
            cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"}, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
        )  # fmt: skip

        def kill(environ, program=program, method=method, part=part) -> bool:
            if environ["REQUEST_METHOD"] == method and part in environ["PATH_INFO"]:
                program.kill()
                return True
            return False

        application.failing = kill
        try:
            _, error = program.communicate(timeout=1800)
        finally:
            program.kill()
        assert program.returncode == -9, f"{method} {part}: {error.decode()}"
        application.failing = lambda environ: False
        newest = max(steps_of(url), default=0)
        print(f"killed at {method} {part}: newest whole checkpoint {newest}")
        assert newest >= reached
        reached = newest
    machine()
    code, _, error = train_cli(*flags(12, starting_point, url))
    assert code == 0, error
    assert losses(stores.read(f"{url}/metrics.jsonl")) == losses((tmp_path / "unbroken/metrics.jsonl").read_bytes())
    assert files(stores.fetch(f"{url}/export")) == files(tmp_path / "unbroken" / "export")


# --- a store that fails


def test_errors_that_pass_lose_nothing(s3, tmp_path, caplog):
    caplog.set_level("INFO", logger="absl")
    bucket, application = s3
    unbroken = run(str(tmp_path / "unbroken"), 8)
    begun = []

    def failing(environ) -> bool:
        """From the second checkpoint's first upload on, until it is said; s3fs tries some times by itself."""
        if environ["REQUEST_METHOD"] == "PUT" and "/checkpoints/4/" in environ["PATH_INFO"]:
            begun.append(True)
        return bool(begun) and "answers errors (" not in caplog.text

    application.failing = failing
    assert same(run(f"{bucket}/run", 8), unbroken)
    assert application.refused > 1
    assert "answers errors (" in caplog.text
    assert "trying again for up to" in caplog.text
    assert steps_of(f"{bucket}/run") == [8, 6]


@pytest.mark.slow
def test_errors_that_stay_end_the_run_in_a_sentence(s3, tmp_path, monkeypatch, machine):
    bucket, application = s3
    monkeypatch.setattr(stores, "PATIENCE", 0.5)
    unbroken = run(str(tmp_path / "unbroken"), 8)
    application.failing = lambda environ: "/checkpoints/6/" in environ["PATH_INFO"]
    says = r"checkpoints/6/.* cannot be read or written \(.*\): check .*; the same command goes on from the last"
    with pytest.raises(CheckpointError, match=says):
        run(f"{bucket}/run", 8)
    assert steps_of(f"{bucket}/run") == [4, 2]
    application.failing = lambda environ: False
    machine()
    assert same(run(f"{bucket}/run", 8), unbroken)
