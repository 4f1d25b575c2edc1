"""How many images a server draws, and how long its clients wait, against `generate` in batches of the same size.

    python -m benchmarks.bench_serve
    python -m benchmarks.bench_serve --model my-sd15/ --clients 8 --images 64 --steps 20

It starts `jaxdiff-serve` on a free port of the loopback device and lets 1, 8 and 64 clients ask for one image after the
other. The machine should have nothing else to do.
"""

import argparse
import base64
import concurrent.futures
import http.client
import io
import itertools
import json
import subprocess
import sys
import time
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

import jaxdiff


def started(arguments: argparse.Namespace) -> tuple[subprocess.Popen, str]:
    """A server that is ready, and its address."""
    flags = [f"--model={arguments.model}", f"--dtype={arguments.dtype}", f"--batch_size={arguments.batch_size}"]
    flags += ["--port=0", "--queue=256", "--time_limit=3600"]
    process = subprocess.Popen([sys.executable, "-m", "jaxdiff.cli.serve", *flags], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    address = process.stdout.readline().strip()
    while ask(address, "GET", "/readyz")[0] != 200:
        time.sleep(0.2)
    return process, address


def ask(address: str, method: str, path: str, body: dict | None = None) -> tuple[int, bytes]:
    """One request: its status and answer."""
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=3600)
    headers = {"Content-Type": "application/json"}
    connection.request(method, path, None if body is None else json.dumps(body), headers)
    answer = connection.getresponse()
    found = answer.status, answer.read()
    connection.close()
    return found


def one_image(address: str, seed: int, steps: int) -> tuple[float, bool]:
    """Seconds that an image took, and whether it came."""
    began = time.perf_counter()
    body = {"prompt": f"an owl, number {seed}", "seed": seed, "steps": steps}
    status, answer = ask(address, "POST", "/v1/images/generations", body)
    whole = False
    if status == 200:
        data = base64.b64decode(json.loads(answer)["data"][0]["b64_json"])
        whole = Image.open(io.BytesIO(data)).mode == "RGB"
    return time.perf_counter() - began, whole


def load(address: str, clients: int, images: int, steps: int, seeds: itertools.count) -> None:
    """Let so many clients ask for so many images in all, and print a row."""
    began = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        found = list(pool.map(lambda _: one_image(address, next(seeds), steps), range(images)))
    seconds = time.perf_counter() - began
    waits = [wait for wait, _ in found]
    lost = sum(not whole for _, whole in found)
    p50, p99 = np.percentile(waits, (50, 99))
    print(f"| {clients} | {images} | {images / seconds:.2f} | {p50:.2f} | {p99:.2f} | {lost} |", flush=True)


def alone(arguments: argparse.Namespace) -> None:
    """What `generate` draws a second, by batch size."""
    model, params = jaxdiff.load(arguments.model, dtype=arguments.dtype)
    params = jaxdiff.replicate(params)
    size = 1
    while size <= arguments.batch_size:
        prompts = [f"an owl, number {i}" for i in range(size)]
        jaxdiff.generate(model, params, prompts, "", steps=arguments.steps)
        began, rounds = time.perf_counter(), max(1, 8 // size)
        for i in range(rounds):
            jaxdiff.generate(model, params, prompts, "", steps=arguments.steps, seed=i)
        print(f"generate, batch of {size}: {rounds * size / (time.perf_counter() - began):.2f} images/s", flush=True)
        size *= 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="icons")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--images", type=int, default=64, help="of each number of clients")
    arguments = parser.parse_args()
    alone(arguments)
    process, address = started(arguments)
    try:
        seeds = itertools.count()
        for count in (1, 4 * arguments.batch_size):  # every batch size is compiled before it is measured
            with concurrent.futures.ThreadPoolExecutor(count) as pool:
                list(pool.map(lambda _: one_image(address, next(seeds), arguments.steps), range(count)))
        print("| clients | images | images/s | median s | 99th percentile s | lost |\n|---|---|---|---|---|---|")
        for clients in arguments.clients:
            load(address, clients, arguments.images, arguments.steps, seeds)
    finally:
        process.terminate()
        print(f"exit code {process.wait(120)}")


if __name__ == "__main__":
    main()
