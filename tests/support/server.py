"""The server in this process, on a free port of the loopback device."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import uvicorn

from jaxdiff.cli.serve_options import LOOPBACK
from jaxdiff.serving.app import create_app
from jaxdiff.serving.engine import Engine
from jaxdiff.serving.metrics import Metrics
from jaxdiff.serving.requests import Limits
from jaxdiff.serving.service import Service
from tests.support.tiny import SIDE

NAME = "tiny"
STEPS = 4
UPSCALER = "net"


@contextlib.contextmanager
def serving(
    tiny: tuple, limits: Limits | None = None, start: bool = True, loras: Any = None, **guard: Any
) -> Iterator[tuple]:
    """(address, engine, service) of a server with the tiny model."""
    metrics = Metrics()
    limits = limits or Limits(((SIDE, SIDE), (2 * SIDE, SIDE)), steps=60, images=6, queue=12, seconds=120, texts=15)
    engine = Engine(*tiny, limits, batch_sizes=(1, 4), window=0.05, loras=loras, observe=metrics.observe)
    engine._warm_up = engine._warm_up[:1]
    upscaler = None if tiny[0].upscaler is None else UPSCALER
    service = Service(engine, NAME, {"model": NAME, "dtype": "float32"}, STEPS, pixels=512 * 512, upscaler=upscaler)
    app = create_app(service, metrics, **({"hosts": LOOPBACK, "body": 1 << 20} | guard))
    place = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", ws="none", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, args=([place],), daemon=True)
    if start:
        engine.start()
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{place.getsockname()[1]}", engine, service
    finally:
        engine.stop()
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()
        if start:
            assert engine.join(60)
