"""Object stores for tests: one in memory, and a server that speaks S3, here, which can fail on purpose."""

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxdiff import stores

BUCKET = "bucket"


class Failing:
    """A WSGI application whose answers are errors as long as `failing` says so of a request."""

    def __init__(self, application) -> None:
        self._application = application
        self.failing = lambda environ: False
        self.refused = 0

    def __call__(self, environ, start_response):
        if self.failing(environ):
            self.refused += 1
            start_response("503 Slow Down", [("Content-Type", "application/xml")])
            return [b"<Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>"]
        return self._application(environ, start_response)


@contextlib.contextmanager
def s3_server() -> Iterator[tuple[str, Failing]]:
    """(address, application) of moto's S3 server on this machine, with an empty bucket."""
    pytest.importorskip("moto", reason="the extra `test` brings it")
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from moto.s3.models import s3_backends
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        def log(self, *args: object) -> None:
            pass

    application = Failing(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=Quiet)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    for account in s3_backends.values():
        for backend in account.values():
            backend.reset()
    try:
        yield f"http://127.0.0.1:{server.server_port}", application
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def s3_environment(address: str) -> dict[str, str]:
    """What a process needs to find the server."""
    return {
        "AWS_ENDPOINT_URL": address, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_MAX_ATTEMPTS": "1", "AWS_EC2_METADATA_DISABLED": "true",
    }  # fmt: skip


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A function that goes on to a machine whose disk is new."""
    count = iter(range(100))

    def new() -> Path:
        folder = tmp_path / f"machine-{next(count)}"
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
        return folder

    new()
    return new


@pytest.fixture
def memory(machine, monkeypatch):
    """The path of an empty store in this process's memory."""
    from fsspec.implementations.memory import MemoryFileSystem

    monkeypatch.setitem(stores.SCHEMES, "memory", "fsspec")
    monkeypatch.setattr(MemoryFileSystem, "store", {})
    monkeypatch.setattr(MemoryFileSystem, "pseudo_dirs", [""])
    return f"memory://{BUCKET}"


@pytest.fixture(scope="module")
def server():
    with s3_server() as found:
        yield found


@pytest.fixture
def s3(server, machine, monkeypatch):
    """(the path of an empty bucket on a server, the server's application)."""
    import s3fs

    for name, value in s3_environment(server[0]).items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    stores._filesystem.cache_clear()
    bucket = f"{BUCKET}-{time.monotonic_ns()}"
    stores._filesystem("s3").mkdir(bucket)
    yield f"s3://{bucket}", server[1]
    server[1].failing = lambda environ: False
    stores._filesystem.cache_clear()


@pytest.fixture(params=["memory", "s3"])
def bucket(request):
    """An empty bucket of either store."""
    found = request.getfixturevalue(request.param)
    return found if isinstance(found, str) else found[0]
