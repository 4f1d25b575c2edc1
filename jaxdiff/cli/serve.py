"""Serve images to other programs: a server with OpenAI's images API and AUTOMATIC1111's.

    jaxdiff-serve --model icons
    jaxdiff-serve --model sd15/ --dtype bfloat16 --lora_dir loras/ --host 0.0.0.0 --api_key "$JAXDIFF_API_KEY"

It loads the model once, and batches requests that share a program. Its address goes to stdout, warnings and errors to
stderr. SIGTERM or Ctrl-C stops it: images being drawn are delivered, waiting requests get an error. Exit code: 0 when
stopped so; 2 for wrong flags; 1 for any other failure.
"""

import importlib.util
import logging
import math
import signal
import socket
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import jax
from absl import flags

import jaxdiff
from jaxdiff import parallel
from jaxdiff.cli import errors, sample
from jaxdiff.cli.adapters import read_adapters
from jaxdiff.cli.errors import Failure, UsageError, file_errors
from jaxdiff.cli.flags import check_files, check_unet, parse_lora
from jaxdiff.cli.loading import load
from jaxdiff.cli.serve_options import ALL, LOOPBACK, parse, parse_sizes
from jaxdiff.errors import ArgumentError
from jaxdiff.io import cache, model_paths
from jaxdiff.io.upscaler import load_upscaler
from jaxdiff.sampling.checks import check_memory, min_memory
from jaxdiff.sampling.resolve import latent_shape
from jaxdiff.serving.loras import Loras, lora_files

REQUIRED_PACKAGES = ("fastapi", "uvicorn", "prometheus_client", "python_multipart")
ASPECT_RATIOS = (1.0, 4 / 3, 3 / 4, 3 / 2, 2 / 3, 16 / 9, 9 / 16)  # of the sizes drawn by default
STOP_TIMEOUT = 30.0  # seconds to wait for the engine
CONNECTIONS = 512
NO_UPSCALER = "none"  # in place of an upscaler's name


def sizes(f: flags.FlagValues, model: jaxdiff.Model) -> tuple[tuple[int, int], ...]:
    """The sizes (width, height) that may be drawn, the default first. Raises UsageError."""
    factor, multiple = model.vae.config.factor, model.multiple
    allowed = parse_sizes(f)
    if not allowed:
        height, width, _ = latent_shape(model, None, None)
        default = width, height = width * factor, height * factor
        levels = 0 if model.unet is None else len(model.unet.config.block_out_channels) - 1
        unit = multiple * 2**levels
        variants = [(math.sqrt(width * height * r), math.sqrt(width * height / r)) for r in ASPECT_RATIOS]
        allowed = tuple(dict.fromkeys([default, *((round_to(w, unit), round_to(h, unit)) for w, h in variants)]))
    for width, height in allowed:
        if width % multiple or height % multiple or not width or not height:
            raise UsageError(f"--sizes: {width}x{height} must be multiples of {multiple} for this model.")
        try:
            latent_shape(model, height, width)
            check_memory(model, height, width, None)
        except ArgumentError as e:
            raise UsageError(f"--sizes: {e}") from None
    return allowed


def round_to(pixels: float, unit: int) -> int:
    """The multiple of `unit` nearest to `pixels`, at least `unit`."""
    return max(unit, round(pixels / unit) * unit)


def batch_sizes(f: flags.FlagValues, model: jaxdiff.Model, largest: tuple[int, int]) -> list[int]:
    """The batch sizes: 1, 2, 4, … images a device, up to --batch_size in all."""
    devices = jax.local_device_count() // f.tensor
    max_images = f.batch_size
    if max_images is None:
        width, height = largest
        per_device = int(min(4, max(1, parallel.device_memory() / min_memory(model, height, width, None))))
        max_images = devices * per_device
    return [devices * 2**k for k in range(12) if k == 0 or devices * 2**k <= max_images]


def load_model(f: flags.FlagValues) -> tuple[jaxdiff.Model, Any, Loras, tuple[tuple[int, int], ...]]:
    """The model with the adapters of the flags, its parameters on their devices, the LoRAs, and the sizes."""
    mesh = sample.device_mesh(f)
    with file_errors("--model"):
        path = model_paths.find(f.model)
    cache.cache_compilations(f.cache_dir)
    sample.check_networks(f)
    model = sample.describe_model(f, path)
    if model.family == "upscaler":
        raise UsageError("--model enlarges images, which no request asks for: give a model that draws from text.")
    if model.is_gan:
        raise UsageError("--model is a GAN, and requests are for models that draw step by step: use sample.py.")
    check_unet(f, model)
    allowed_sizes = sizes(f, model)
    upscaler = None
    if f.upscaler != NO_UPSCALER:
        with file_errors("--upscaler"):
            upscaler = load_upscaler(f.upscaler, dtype=f.dtype)
    adapters = read_adapters(f, model, mesh)
    named_loras = lora_files(f.lora_dir)
    lora_paths: list[str | Path] = [*(parse_lora(given)[0] for given in f.lora), *named_loras.values()]
    model, params = load(f, path, adapters, lora_paths, mesh)
    if upscaler is not None:
        model, params = jaxdiff.with_upscaler(model, params, upscaler)

    def place(params: Any) -> Any:
        return jaxdiff.replicate(params) if mesh is None else jaxdiff.shard(params, mesh)

    params = place(params)
    return model, params, Loras(model, params, named_loras, place), allowed_sizes


def base_name(path: str) -> str:
    """The name of a file or folder in the APIs."""
    return Path(path.rstrip("/")).name


def listen(f: flags.FlagValues) -> socket.socket:
    """The socket of --host and --port. Raises Failure."""
    family = socket.AF_INET6 if ":" in f.host else socket.AF_INET
    try:
        return socket.create_server((f.host, f.port), family=family, backlog=256)
    except OSError as e:
        reason = e.strerror or e
        raise Failure(f"--host {f.host} --port {f.port}: {reason}: stop what listens there, or name others.") from None


def run(f: flags.FlagValues) -> None:
    """Serve until a signal comes."""
    if missing := [name for name in REQUIRED_PACKAGES if importlib.util.find_spec(name) is None]:
        raise Failure(f"{missing[0]} is not installed: pip install 'jaxdiff[serve]'.")
    check_files(f, ALL)
    with listen(f) as listener:
        serve(f, listener)


def default_steps(f: flags.FlagValues, model: jaxdiff.Model) -> int:
    """Steps of a request that names none: those of --steps, else the model's, at most --max_steps."""
    return f.steps or min(model.options.steps, f.max_steps)


def serve(f: flags.FlagValues, listener: socket.socket) -> None:
    """Load the model and answer at a socket until a signal comes."""
    import uvicorn

    from jaxdiff.serving.app import create_app
    from jaxdiff.serving.engine import Engine
    from jaxdiff.serving.metrics import Metrics
    from jaxdiff.serving.requests import Limits
    from jaxdiff.serving.service import Service

    model, params, loras, allowed_sizes = load_model(f)
    metrics = Metrics()
    limits = Limits(
        allowed_sizes, steps=f.max_steps, images=f.max_images, queue=f.queue, programs=f.programs, seconds=f.time_limit
    )
    counts = batch_sizes(f, model, max(allowed_sizes, key=math.prod))
    window = f.window_ms / 1000
    engine = Engine(model, params, limits, batch_sizes=counts, window=window, loras=loras, observe=metrics.observe)
    name = f.model_name or base_name(f.model)
    upscaler = None if model.upscaler is None else base_name(f.upscaler)
    described = {"model": name, "dtype": f.dtype}
    service = Service(engine, name, described, default_steps(f, model), upscaler=upscaler)
    hosts = LOOPBACK if f.api_key is None and f.host in LOOPBACK else None
    app = create_app(service, metrics, api_key=f.api_key, hosts=hosts, body=f.max_body_mb << 20)
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, ws="none", limit_concurrency=CONNECTIONS,
        timeout_keep_alive=30, timeout_graceful_shutdown=math.ceil(f.time_limit),
    )  # fmt: skip

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            engine.stop()
            super().handle_exit(sig, frame)

    engine.start()
    address = f"[{f.host}]" if ":" in f.host else f.host
    print(f"http://{address}:{listener.getsockname()[1]}", flush=True)
    for sig in (signal.SIGTERM, signal.SIGINT):  # uvicorn handles them, and raises them again at the end
        signal.signal(sig, signal.SIG_IGN)
    Server(config).run([listener])
    engine.stop()
    if not engine.join(STOP_TIMEOUT):
        logging.warning("what is being drawn is left unfinished.")


def main(argv: list[str] | None = None) -> int:
    """Run a command line, by default this program's; returns the exit code."""
    argv = sys.argv if argv is None else argv
    return errors.main(
        Path(argv[0]).name,
        argv,
        __doc__,
        parse,
        run,
        smaller="lower --batch_size or --sizes, or use --dtype=bfloat16",
        stopped="nothing is being drawn",
    )


if __name__ == "__main__":
    sys.exit(main())
