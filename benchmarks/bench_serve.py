"""How many images a server draws, how long its clients wait, and how its memory grows, against `generate` alone.

    python -m benchmarks.bench_serve
    python -m benchmarks.bench_serve --clients 1 8 --images 24 --memory 0
    python -m benchmarks.bench_serve --size 64x64 --steps 4 --clients 8 --memory 1000      only the memory, in minutes
    python -m benchmarks.bench_serve --model my-sd15/ --steps 20 --batch_size 8

It starts `jaxdiff-serve` on a free port of the loopback device and lets 1, 8 and 64 clients ask for one image after the
other; `generate` draws batches of the same sizes before and after that, in a process of its own. Then eight clients
ask for many images, and the server's resident memory is read. The machine should have nothing else to do.
"""

import argparse
import base64
import concurrent.futures
import http.client
import io
import itertools
import json
import multiprocessing
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

MEMORY_CLIENTS = 8
ROUNDS = 8  # images that `generate` draws of each batch size, at least


class Answer(NamedTuple):
    seconds: float
    status: int
    body: bytes


class Client:
    """One client, which keeps its connection."""

    def __init__(self, address: str, arguments: argparse.Namespace) -> None:
        self._connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=3600)
        self._asked = {"steps": arguments.steps} | ({} if arguments.size is None else {"size": arguments.size})

    def ask(self, method: str, path: str, body: dict | None = None) -> Answer:
        start_time = time.perf_counter()
        headers = {"Content-Type": "application/json"}
        self._connection.request(method, path, None if body is None else json.dumps(body), headers)
        answer = self._connection.getresponse()
        content = answer.read()
        return Answer(time.perf_counter() - start_time, answer.status, content)

    def draw(self, seed: int) -> Answer:
        body = {"prompt": f"an owl, number {seed}", "seed": seed, **self._asked}
        return self.ask("POST", "/v1/images/generations", body)


def start_server(arguments: argparse.Namespace) -> tuple[subprocess.Popen, str]:
    """A server that is ready, and its address."""
    flags = [f"--model={arguments.model}", f"--dtype={arguments.dtype}", f"--batch_size={arguments.batch_size}"]
    flags += [
        "--port=0",
        "--queue=256",
        "--time_limit=3600",
        *([f"--sizes={arguments.size}"] if arguments.size else []),
    ]
    process = subprocess.Popen([sys.executable, "-m", "jaxdiff.cli.serve", *flags], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    address = process.stdout.readline().strip()
    client = Client(address, arguments)
    while client.ask("GET", "/readyz").status != 200:
        time.sleep(0.2)
    return process, address


def is_valid(answer: Answer) -> bool:
    """Whether an image came."""
    if answer.status != 200:
        return False
    (entry,) = json.loads(answer.body)["data"]
    with Image.open(io.BytesIO(base64.b64decode(entry["b64_json"]))) as image:
        image.load()
        return image.mode == "RGB"


def draw_all(address: str, arguments: argparse.Namespace, clients: int, images: int, seeds: itertools.count) -> tuple:
    """(seconds in all, answers): so many clients ask for one image after the other, so many in all."""
    local = threading.local()

    def one(seed: int) -> Answer:
        if not hasattr(local, "client"):
            local.client = Client(address, arguments)
        return local.client.draw(seed)

    start_time = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(one, itertools.islice(seeds, images)))
    return time.perf_counter() - start_time, answers


def generate_rates(arguments: argparse.Namespace) -> dict[int, float]:
    """What `generate` draws a second, by batch size. In a process of its own, which gives its memory back."""
    import jaxdiff

    model, params = jaxdiff.load(arguments.model, dtype=arguments.dtype)
    params = jaxdiff.replicate(params)
    width, height = (None, None) if arguments.size is None else map(int, arguments.size.split("x"))
    options = {"steps": arguments.steps, "width": width, "height": height}
    rates, size = {}, 1
    while size <= arguments.batch_size:
        prompts = [f"an owl, number {i}" for i in range(size)]
        jaxdiff.generate(model, params, prompts, **options)
        start_time, rounds = time.perf_counter(), max(2, ROUNDS // size)
        for i in range(rounds):
            jaxdiff.generate(model, params, prompts, seed=i, **options)
        rates[size] = rounds * size / (time.perf_counter() - start_time)
        size *= 2
    return rates


def run_in_process(arguments: argparse.Namespace) -> dict[int, float]:
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        rates = pool.submit(generate_rates, arguments).result()
    print("generate, images/s: " + ", ".join(f"{rate:.2f} in batches of {size}" for size, rate in rates.items()))
    return rates


def resident(pid: int) -> float:
    """Mebibytes of memory that a process holds, on Linux."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


def measure_memory(
    process: subprocess.Popen, address: str, arguments: argparse.Namespace, seeds: itertools.count
) -> None:
    """Let clients ask for many images, and print the server's memory at the start, in between and at the end."""
    parts, failed = [], 0
    print("| images | resident MiB | images/s |\n|---|---|---|")
    print(f"| 0 | {resident(process.pid):.0f} | |", flush=True)
    for part in range(4):
        count = arguments.memory * (part + 1) // 4 - arguments.memory * part // 4
        seconds, answers = draw_all(address, arguments, MEMORY_CLIENTS, count, seeds)
        failed += sum(not is_valid(answer) for answer in answers)
        parts.append(resident(process.pid))
        done = arguments.memory * (part + 1) // 4
        print(f"| {done} | {parts[-1]:.0f} | {count / seconds:.2f} |", flush=True)
    print(f"{parts[-1] - parts[0]:+.0f} MiB from the first quarter to the last; {failed} lost", flush=True)


def measure_clients(address: str, arguments: argparse.Namespace, seeds: itertools.count) -> dict[int, float]:
    """Images/s by number of clients, as rows that are printed."""
    rates = {}
    print("| clients | images | images/s | median s | 99th percentile s | lost |\n|---|---|---|---|---|---|")
    for clients in arguments.clients:
        images = max(arguments.images, 2 * clients)
        seconds, answers = draw_all(address, arguments, clients, images, seeds)
        failed = sum(not is_valid(answer) for answer in answers)
        p50, p99 = np.percentile([answer.seconds for answer in answers], (50, 99))
        rates[clients] = images / seconds
        print(f"| {clients} | {images} | {rates[clients]:.2f} | {p50:.2f} | {p99:.2f} | {failed} |", flush=True)
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="icons")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--size", help="width x height, by default the model's own")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--images", type=int, default=64, help="of each number of clients; at least two a client")
    parser.add_argument("--memory", type=int, default=1000, help="images while memory is watched; 0 leaves that out")
    arguments = parser.parse_args()
    before = run_in_process(arguments)
    process, address = start_server(arguments)
    try:
        seeds = itertools.count()
        for count in (1, 4 * arguments.batch_size):  # every batch size is compiled before it is measured
            draw_all(address, arguments, count, count, seeds)
        rates = measure_clients(address, arguments, seeds)
        if arguments.memory:
            measure_memory(process, address, arguments, seeds)
    finally:
        process.terminate()
        print(f"exit code {process.wait(120)}", flush=True)
    after = run_in_process(arguments)
    for clients, rate in rates.items():
        size = max(size for size in before if size <= max(1, clients))
        rate_before, rate_after = before[size], after[size]
        print(f"{clients} clients: {2 * rate / (rate_before + rate_after):.2f} of generate in batches of {size}")


if __name__ == "__main__":
    main()
