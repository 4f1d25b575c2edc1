"""Training on several devices and several hosts, simulated by processes of their own."""

import json

import numpy as np
import pytest

from tests.support.processes import finish, free_port, start
from tests.support.train_on_devices import CLIP_STEPS, MESHES, OPTIMIZERS, STEPS
from tests.support.train_on_hosts import main as train_on_hosts
from tests.support.train_on_hosts import write_images

pytestmark = pytest.mark.slow  # the processes of `report` take minutes


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict:
    """Of train_on_devices: losses and messages by mesh, "hosts" those of two processes with four devices."""
    folder = tmp_path_factory.mktemp("devices")
    finish(start("tests.support.train_on_devices", folder / "report.json", devices=8))
    files = [folder / f"host-{i}.json" for i in range(2)]
    port = free_port()
    finish(*(start("tests.support.train_on_devices", file, port, i, 2, devices=4) for i, file in enumerate(files)))
    hosts = [json.loads(file.read_text()) for file in files]
    assert hosts[0] == hosts[1]
    report = json.loads((folder / "report.json").read_text())
    assert report["devices"] == hosts[0]["devices"] == 8
    return report | {"hosts": hosts[0]["hosts"]}


@pytest.mark.parametrize("mesh", ["data", "fsdp", "all"])
def test_every_mesh_gives_the_same_losses(report, mesh):
    one, other = report["one"], report[mesh]
    assert len(set(one["losses"])) == STEPS
    assert one["moved"] > 0.01 * one["norm"]
    np.testing.assert_allclose(other["losses"], one["losses"], rtol=1e-5)
    np.testing.assert_allclose(other["norm"], one["norm"], rtol=1e-5)
    np.testing.assert_allclose(other["moved"], one["moved"], rtol=1e-4)


@pytest.mark.parametrize("mesh", ["clip all", "hosts", "adversary all", "gan all", "upscaler all"])
def test_other_losses_are_the_same_on_every_mesh(report, mesh):
    kind = mesh.split()[0].replace("hosts", "clip")
    one, other = report[f"{kind} one"], report[mesh]
    assert len(set(one["losses"])) == CLIP_STEPS
    np.testing.assert_allclose(other["losses"], one["losses"], rtol=1e-5)
    np.testing.assert_allclose(other["norm"], one["norm"], rtol=1e-5)
    np.testing.assert_allclose(other["moved"], one["moved"], rtol=1e-4)


def test_parameters_are_divided_where_the_mesh_says_so(report):
    axes = {name: {axis for axis in ("fsdp", "tensor") if axis in str(report[name]["specs"])} for name in MESHES}
    assert axes == {"one": set(), "data": set(), "fsdp": {"fsdp"}, "all": {"fsdp", "tensor"}}


def test_hosts_start_without_sending_each_other_their_parameters(report):
    assert report["hosts"]["gathered"] == 0


def test_one_device_sends_nothing(report):
    assert report["one"]["sends"] == {}


def test_data_parallel_steps_send_the_gradient_once_and_nothing_else(report):
    (kind,), (size,) = zip(*report["data"]["sends"].items(), strict=True)
    assert kind == "all-reduce data"
    assert size == report["data"]["trained"] + 4  # and the loss


def test_divided_parameters_are_gathered_once_and_their_gradients_summed_once(report):
    sends, trained, divided = (report["fsdp"][name] for name in ("sends", "trained", "divided"))
    # A program for TPUs and GPUs has a reduce-scatter in place of the all-reduce. The gradient of the table of words
    # is not summed: each device adds the rows of its part. The norms of arrays and the loss are sums as well.
    assert sends.pop("all-gather fsdp") <= divided  # what this loss does not use is not gathered
    assert trained / 2 < sends.pop("all-reduce fsdp") < trained + 8192
    assert sum(sends.values()) < 1024  # examples change places


def test_parameters_are_gathered_in_the_type_that_is_computed_in(report):
    own, half = (report["half"][name] for name in ("float32", "bfloat16"))
    assert half["losses"] == own["losses"]  # bit for bit
    assert half["norm"] == own["norm"]
    assert len(set(half["losses"])) == 3
    assert own["gathers"] - half["gathers"] == own["divided"] / 2  # the rest is of examples, for the contrast


def test_the_tensor_axis_adds_sums_of_activations_and_the_halves_of_gated_layers(report):
    kinds = {tuple(name.split()) for name in report["all"]["sends"]}
    across = {kind for kind, axes in kinds if "tensor" in axes.split(",")}
    # The gated layer's halves lie on different devices, docs/scaling.md says at what cost.
    assert across <= {"all-reduce", "all-to-all", "collective-permute"}
    assert {"all-gather"} == {kind for kind, axes in kinds if kind.startswith("all-g")}


def test_hosts_train_together_and_others_go_on(tmp_path):
    """One process with one device, then two with four each, then the one: as if it had never changed. An image is
    damaged.
    """
    data = write_images(tmp_path / "data")

    def run(folder: str, steps: int, processes: int) -> np.ndarray:
        workdir, port = tmp_path / folder, free_port()
        workdir.mkdir(exist_ok=True)
        if processes == 1:
            train_on_hosts(port, 0, 1, data, workdir, steps)
        else:
            rest = (processes, data, workdir, steps)
            finish(*(start("tests.support.train_on_hosts", port, i, *rest, devices=4) for i in range(processes)))
        results = [np.load(workdir / f"result-{i}.npz") for i in range(processes)]
        assert [int(r["step"]) for r in results] == [steps] * processes
        assert all((r["w"] == results[0]["w"]).all() for r in results)
        lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        return np.asarray([line["loss"] for line in lines])

    unbroken = run("a", 9, 1)  # 72 examples of 13: the borders of epochs are within batches
    assert len(set(unbroken.tolist())) == 9
    for steps, processes in ((3, 1), (6, 2), (9, 1)):
        broken = run("b", steps, processes)
    np.testing.assert_allclose(broken, unbroken, rtol=1e-5)


@pytest.mark.parametrize("case", OPTIMIZERS)
def test_every_optimizer_is_divided_and_goes_on_on_another_mesh(report, case):
    one, moved = report["optimizers"][case]
    assert moved["restored"]  # bit for bit, on a mesh of another shape
    assert all(axis in str(moved["specs"]) for axis in ("fsdp", "tensor"))
    np.testing.assert_allclose(moved["losses"], one["losses"], rtol=1e-5)
    np.testing.assert_allclose(moved["norm"], one["norm"], rtol=1e-5)
    assert len(set(one["losses"])) == 4
