"""sample.py on several hosts, simulated by processes."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxdiff.io.images import read_image
from tests.support.comparison import levels
from tests.support.processes import ROOT, free_port

PROMPTS = ["--prompt=a castle", "--prompt=a blue house", "--prompt=a red dragon", "--steps=2", "--batch_size=2"]


def start(process: int, processes: int, port: int, *args: object, cwd: Path, devices: int = 1) -> subprocess.Popen:
    where = [f"--coordinator_address=localhost:{port}", f"--num_processes={processes}", f"--process_id={process}"]
    command = [sys.executable, str(ROOT / "sample.py"), *map(str, args), *where]
    flags = os.environ.get("XLA_FLAGS", "") + (f" --xla_force_host_platform_device_count={devices}" * (devices > 1))
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    return subprocess.Popen(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_two_processes_write_the_files_of_one(sample_cli, tiny_folder, tmp_path):
    """Five batches of two prompts, so that one has more than the other; each file by one of them, the sheet too."""
    args = [*PROMPTS, "--num_images=3", "--grid", "--preview"]
    code, alone, err = sample_cli(*args, "--output=alone")
    assert code == 0, err
    port = free_port()
    more = [*args, f"--model={tiny_folder}", "--output=together"]
    both = [start(i, 2, port, *more, cwd=tmp_path) for i in range(2)]
    outputs = [process.communicate(timeout=900) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs[0][1]
    written = [[line for line in out.splitlines() if "Gloo" not in line] for out, _ in outputs]  # CPUs' messages
    assert len(written[0]) == 2 * 5 + 1
    assert len(written[1]) == 2 * 4
    assert sorted(written[0] + written[1]) == sorted(path.replace("alone", "together") for path in alone)
    for path in alone:
        assert Path(path).read_bytes() == Path(path.replace("alone", "together")).read_bytes(), path


@pytest.mark.slow
def test_each_process_divides_the_model_over_its_own_devices(sample_cli, tiny_folder, tmp_path):
    """The images of one process that has the whole model: gathering it is exact, and sums differ by the batch alone."""
    args = [*PROMPTS, "--num_images=2"]
    code, alone, err = sample_cli(*args, "--output=alone")
    assert code == 0, err
    port, more = free_port(), [*args, "--fsdp=2", f"--model={tiny_folder}", "--output=together"]
    both = [start(i, 2, port, *more, cwd=tmp_path, devices=2) for i in range(2)]
    outputs = [process.communicate(timeout=900) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs[0][1]
    for path in alone:
        assert levels(read_image(path), read_image(path.replace("alone", "together"))) <= 1, path


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
def test_a_host_that_fails_is_named_and_the_other_ends(tiny_folder, tmp_path, failing):
    """The first process as well, which the other needs to the end; nobody waits for a sheet that cannot be."""
    port, args = free_port(), [*PROMPTS, "--grid", f"--model={tiny_folder}", "--output={index}.png"]
    more = {failing: ["--lora=gone.safetensors"]}
    both = [start(i, 2, port, *args, *more.get(i, ()), cwd=tmp_path) for i in range(2)]
    errors = [process.communicate(timeout=900)[1] for process in both]
    assert "--lora: gone.safetensors does not exist" in errors[failing]
    assert f"Process {failing} of 2 has stopped, and its images are missing" in errors[1 - failing]
    assert [process.returncode for process in both] == [2 if i == failing else 1 for i in range(2)]
    assert not any("Traceback" in error for error in errors)


def test_a_host_that_stays_alone_says_so(tmp_path):
    port = free_port()
    program = f"""
import sys
from jaxdiff.cli import hosts, sample
hosts.CONNECT_TIMEOUT = 2
sys.exit(sample.main(["sample.py", "--prompt=a", "--output=x.png", "--coordinator_address=localhost:{port}",
                      "--num_processes=2", "--process_id=0"]))
"""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 1
    assert f"not all processes connected at localhost:{port} within 2 s: start the same command" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_host_that_dies_is_named(tiny_folder, tmp_path):
    """Within two minutes, as long as the others wait for a sign of life; they have written their own images."""
    port = free_port()
    args = [*PROMPTS, "--num_images=200", f"--model={tiny_folder}", "--output={index}.png"]
    alive, dead = (start(i, 2, port, *args, cwd=tmp_path) for i in range(2))
    while not (tmp_path / "2.png").exists():  # the first of its images
        time.sleep(0.01)
    dead.kill()
    dead.communicate()
    out, err = alive.communicate(timeout=600)
    assert alive.returncode == 1
    assert "Process 1 of 2 has stopped, and its images are missing" in err
    assert "Traceback" not in err
    assert len(out.splitlines()) == 300
