"""Of the runs whose folder lies in one place of an object store one trains: its lock, and who follows a dead one."""

import json
import os

import pytest

from jaxdiff import stores
from jaxdiff.training import remote, remote_checkpoints
from jaxdiff.training.loop import fit
from jaxdiff.training.workdir import WorkdirError
from tests.support.batches import FromMemory
from tests.support.line import LINE, line_data, linear_stage, one_device
from tests.support.stages import options


def mark(**changes) -> bytes:
    """The lock of a run on another machine that is no more."""
    gone = {"token": "another", "pid": 1, "host": "elsewhere", "machine": ["elsewhere"], "started": "0", "beats": 0}
    return json.dumps(gone | changes).encode()


def test_a_second_run_is_refused_while_the_first_lives(bucket, monkeypatch):
    monkeypatch.setattr(remote, "LEASE", 20.0)
    lock = f"{bucket}/run/lock"
    here = {"pid": os.getpid(), "machine": remote._machine(), "started": remote._started(os.getpid())}
    stores.write(lock, mark(**here))
    with pytest.raises(WorkdirError, match=rf"{bucket}/run is in use by another run \(process {os.getpid()} on "):
        remote.held(remote.workdir(f"{bucket}/run")).__enter__()
    beats = iter(range(10**6))
    stores.write(lock, mark())
    renewing = remote._RepeatingTimer(0.1, lambda: stores.write(lock, mark(beats=next(beats))))
    try:
        with pytest.raises(WorkdirError, match=r"is in use by another run \(process 1 on elsewhere\)"):
            remote.held(remote.workdir(f"{bucket}/run")).__enter__()
    finally:
        renewing.stop()
    assert json.loads(stores.read(lock))["token"] == "another"


def test_a_run_that_died_is_followed(bucket, monkeypatch, caplog):
    renewals: list = []

    class ByHand:
        def __init__(self, seconds, run) -> None:
            renewals.append(run)

        def stop(self) -> None:
            pass

    monkeypatch.setattr(remote, "_RepeatingTimer", ByHand)
    monkeypatch.setattr(remote, "LEASE", 0.5)
    caplog.set_level("INFO", logger="absl")
    url = f"{bucket}/run"
    stores.write(f"{url}/lock", mark())
    with remote.held(remote.workdir(url)):
        assert "Waiting up to 0.5 s" in caplog.text
        remote.check_own(url)
        stores.write(f"{url}/lock", mark())  # as if it had come back
        says = "has been taken over by another run"
        with pytest.raises(WorkdirError, match=says):
            fit(
                linear_stage(), LINE, FromMemory(line_data(), 3, 7), options(steps=2, batch_size=3),
                remote.workdir(url), mesh=one_device(),
            )  # fmt: skip
        assert remote_checkpoints.complete_steps(f"{url}/checkpoints") == []
        with pytest.raises(WorkdirError, match=says):
            renewals[0]()
    assert json.loads(stores.read(f"{url}/lock"))["token"] == "another"
    monkeypatch.setattr(remote, "LEASE", 1000.0)
    stores.write(f"{url}/lock", mark(machine=remote._machine(), started="another process of that number"))
    with remote.held(remote.workdir(url)):
        assert json.loads(stores.read(f"{url}/lock"))["token"] == remote.TOKEN
    assert not stores.exists(f"{url}/lock")


def test_of_two_that_follow_a_dead_run_the_later_one_does_not_remove_the_lock_of_the_first(memory, monkeypatch):
    """Both have seen that it is dead; one takes over before the other does anything."""
    url = f"{memory}/run"
    lock = f"{url}/lock"
    stores.write(lock, mark())

    def dead(lock, holder) -> bool:
        if holder["token"] != "another":
            return False
        stores.write(lock, mark(token="first"))
        return True

    monkeypatch.setattr(remote, "_is_dead", dead)
    with pytest.raises(WorkdirError, match="is in use by another run"):
        remote.held(remote.workdir(url)).__enter__()
    assert json.loads(stores.read(lock))["token"] == "first"
    assert [*stores.listing(url)] == ["lock"]


def test_while_one_removes_the_lock_of_a_dead_run_another_does_not(memory, monkeypatch):
    url, real = f"{memory}/run", stores.remove
    lock, seen = f"{url}/lock", []
    stores.write(lock, mark())

    def remove(*names):
        if names == (lock,) and not seen:  # the other one comes, and by now the first has looked
            with monkeypatch.context() as m:
                m.setattr(remote, "TOKEN", "other")
                seen.append(json.loads(mark()))
                remote._take_over(url, lock, seen[0])
            assert stores.read(lock) == mark()
        real(*names)

    monkeypatch.setattr(stores, "remove", remove)
    monkeypatch.setattr(remote, "_is_dead", lambda lock, holder: holder["token"] == "another")
    with remote.held(remote.workdir(url)):
        assert seen
        assert json.loads(stores.read(lock))["token"] == remote.TOKEN
    assert stores.listing(url) == {}


def test_a_run_that_died_while_it_took_over_is_followed(memory):
    url = f"{memory}/run"
    gone = {"machine": remote._machine(), "started": "another process of that number"}
    stores.write(f"{url}/lock", mark(**gone))
    stores.write(f"{url}/takeover/another", mark(token="third", **gone))
    with remote.held(remote.workdir(url)):
        assert json.loads(stores.read(f"{url}/lock"))["token"] == remote.TOKEN
    assert stores.listing(url) == {}


def test_of_two_that_a_store_without_conditions_lets_lock_one_is_refused(memory, monkeypatch):
    url, real = f"{memory}/run", stores.write

    def write(name, data, **more):
        real(name, data, **more)
        if more.get("new") and json.loads(data)["token"] == remote.TOKEN:
            real(name, mark(token="second"))  # at the same moment

    monkeypatch.setattr(stores, "write", write)
    monkeypatch.setattr(remote, "_is_dead", lambda lock, holder: False)
    with pytest.raises(WorkdirError, match="is in use by another run"):
        remote.held(remote.workdir(url)).__enter__()
