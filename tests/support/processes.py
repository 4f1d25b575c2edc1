"""Programs that tests start beside themselves."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
LIMIT = 1800  # seconds, for one that hangs: on a slow processor some take ten minutes
CONFIG = ROOT / "tests" / "support" / "training_config.py"


def start(module: str, *args: object, devices: int) -> subprocess.Popen:
    flags = os.environ.get("XLA_FLAGS", "") + f" --xla_force_host_platform_device_count={devices}"
    flags += " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, "-m", module, *map(str, args)]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def finish(*processes: subprocess.Popen) -> None:
    try:
        for process in processes:
            output, _ = process.communicate(timeout=LIMIT)
            assert process.returncode == 0, output
    finally:
        for process in processes:
            process.kill()
