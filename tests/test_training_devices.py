"""Training on several devices and several hosts, simulated by processes of their own."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxdiff import parallel

ROOT = Path(__file__).parent.parent


def start(module: str, *args: object, devices: int) -> subprocess.Popen:
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, "-m", module, *map(str, args)]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(*processes: subprocess.Popen) -> None:
    try:
        for process in processes:
            output, _ = process.communicate(timeout=600)
            assert process.returncode == 0, output
    finally:
        for process in processes:
            process.kill()


def test_a_mesh_needs_a_divisor():
    with pytest.raises(ValueError, match="fsdp 3 must divide"):
        parallel.mesh(fsdp=3)


def test_the_largest_divisible_axis_is_split():
    assert parallel.param_spec((3, 3, 8, 16), 4) == parallel.PartitionSpec(None, None, None, "fsdp")
    assert parallel.param_spec((16, 8), 4) == parallel.PartitionSpec("fsdp")
    assert parallel.param_spec((18, 8), 4) == parallel.PartitionSpec(None, "fsdp")
    assert parallel.param_spec((18, 7), 4) == parallel.param_spec((), 4) == parallel.PartitionSpec()


def test_any_number_of_devices_gives_the_same_losses(tmp_path):
    finish(start("tests.train_on_devices", tmp_path / "report.json", devices=8))
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["devices"] == 8
    for stage in ("clip", "vae"):
        one = report[f"{stage} one"]["losses"]
        assert len(set(one)) == 3  # something is learnt
        for division in ("eight", "split"):
            # Sums in another order, by three of Adam's updates: where a gradient is about 0, rounding decides its sign.
            np.testing.assert_allclose(report[f"{stage} {division}"]["losses"], one, rtol=2e-3)
        assert not any("fsdp" in spec for spec in report[f"{stage} eight"]["specs"])
        assert any("fsdp" in spec for spec in report[f"{stage} split"]["specs"])


def test_hosts_train_together_and_go_on_together(tmp_path):
    def run(folder: str, steps: int) -> np.ndarray:
        workdir = tmp_path / folder
        workdir.mkdir(exist_ok=True)
        with socket.socket() as s:
            s.bind(("localhost", 0))
            port = s.getsockname()[1]
        finish(*(start("tests.train_on_hosts", port, i, 2, workdir, steps, devices=2) for i in range(2)))
        results = [np.load(workdir / f"result-{i}.npz") for i in range(2)]
        assert [int(r["step"]) for r in results] == [steps, steps]
        np.testing.assert_array_equal(results[0]["w"], results[1]["w"])
        return results[0]["w"]

    unbroken = run("a", 6)
    run("b", 4)
    np.testing.assert_array_equal(run("b", 6), unbroken)
