"""What nobody should send: each is refused in the API's form, the process lives on, and no memory is kept."""

import base64
import contextlib
import gc
import io
import json
import socket
import struct
import threading
import time
import weakref
import zlib
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tests.support.tiny import SIDE

httpx = pytest.importorskip("httpx", reason="needs the packages of the extra test")
pytest.importorskip("uvicorn")

from jaxdiff.sampling import stepwise  # noqa: E402
from jaxdiff.serving.guard import password  # noqa: E402
from jaxdiff.serving.requests import Cancelled, DrawRequest, Limits  # noqa: E402
from jaxdiff.serving.service import Files  # noqa: E402
from tests.support.server import serving  # noqa: E402

GENERATIONS, TXT2IMG, IMG2IMG = "/v1/images/generations", "/sdapi/v1/txt2img", "/sdapi/v1/img2img"
KEY = "a-long-and-secret-key"


@pytest.fixture(scope="module")
def server(tiny):
    with serving(tiny, seconds=1.0, bodies=3 << 20) as found:
        yield found
        # All of this file later, it still draws.
        answer = httpx.post(found[0] + GENERATIONS, json={"prompt": "a castle", "steps": 2}, timeout=120)
        assert answer.status_code == 200


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims so many pixels and holds none."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


def refused(answer, *statuses) -> str:
    """The sentence of an error in OpenAI's form."""
    assert answer.status_code in statuses, answer.text
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert "Traceback" not in answer.text
    return answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b'"text"', b"\xff\xfe", b"{" * 100_000, b'{"prompt": 1}', b'{"prompt": null}',
     b'{"prompt": "a", "n": 1e400}', b'{"prompt": "a", "guidance_scale": NaN}', b'{"prompt": "a", "seed": 1.5}',
     b'{"prompt": "a", "guidance_scale": -1}', b'{"prompt": "a", "steps": ' + b"9" * 5000 + b"}",
     b'{"prompt": "half \\ud800 pair"}'],
)  # fmt: skip
def test_broken_json_and_numbers(server, body):
    headers = {"content-type": "application/json"}
    assert refused(httpx.post(server[0] + GENERATIONS, content=body, headers=headers), 400)


def test_any_unicode_is_drawn(server):
    prompt = "ein Schloß, 城, قلعة, 🏰\u0000\u202e\ufffe e\u0301"
    answer = httpx.post(server[0] + GENERATIONS, json={"prompt": prompt, "steps": 2}, timeout=120)
    assert answer.status_code == 200
    image = Image.open(io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"])))
    assert json.loads(image.info["jaxdiff"])["prompt"] == prompt


@pytest.mark.parametrize(
    "data", [png_header(50_000, 50_000), png_header(600, 600), b"", b"GIF89a", b"%!PS-Adobe", b"\x89PNG\r\n\x1a\n"]
)
def test_images_that_are_bombs_or_none(server, data):
    """A gigapixel is refused by its header; what is no image is not handed to other programs."""
    answer = httpx.post(f"{server[0]}/v1/images/edits", files={"image": ("x.png", data)}, data={"prompt": "a"})
    assert refused(answer, 400).startswith("image ")
    for more in ({"outpaint": "0,0,9999,9999"}, {"outpaint": "-1,0,0,0"}, {"outpaint": "9" * 30 + ",0,0,0"}):
        files = {"image": ("x.png", data), "control_image": ("x.png", data)}
        assert httpx.post(f"{server[0]}/v1/images/edits", files=files, data={"prompt": "a"} | more).status_code == 400
    extras = httpx.post(f"{server[0]}/sdapi/v1/extra-single-image", json={"image": base64.b64encode(data).decode()})
    assert extras.status_code == 400
    controls = {"prompt": "a", "control_images": [base64.b64encode(data).decode()]}
    assert refused(httpx.post(server[0] + GENERATIONS, json=controls), 400)
    found = httpx.post(server[0] + IMG2IMG, json={"init_images": [base64.b64encode(data).decode()]})
    assert found.status_code == 400
    assert found.json()["detail"].startswith("init_images ")


@pytest.mark.parametrize(("format", "chunk"), [("bmp", None), ("gif", None), ("png", "[1]"), ("png", "[" * 100_000)])
def test_files_that_do_not_say_how_they_were_drawn(server, format, chunk):
    file, text = io.BytesIO(), PngInfo()
    if chunk:
        text.add_text("jaxdiff", chunk)
    Image.new("RGB", (4, 4)).save(file, format, **({"pnginfo": text} if chunk else {}))
    answer = httpx.post(f"{server[0]}/sdapi/v1/png-info", json={"image": base64.b64encode(file.getvalue()).decode()})
    assert answer.json() == {"info": "", "items": {}, "parameters": {}}


@pytest.mark.parametrize("chunk", ['{"prompt": 1}', '{"prompt": "a", "steps": [1], "x": {"y": null}, "z": NaN}'])
def test_settings_that_are_none_do_not_go_on_into_what_is_enlarged(server, chunk):
    file, text = io.BytesIO(), PngInfo()
    text.add_text("jaxdiff", chunk)
    Image.new("RGB", (4, 4)).save(file, "png", pnginfo=text)
    body = {"image": base64.b64encode(file.getvalue()).decode(), "upscaler_1": "Lanczos"}
    answer = httpx.post(f"{server[0]}/sdapi/v1/extra-single-image", json=body)
    with Image.open(io.BytesIO(base64.b64decode(answer.json()["image"]))) as image:
        assert image.size == (8, 8)
        assert set(json.loads(image.info["jaxdiff"])) <= {"prompt", "z"}


@pytest.mark.parametrize("path", ["../../../etc/passwd", "..%2f..%2fetc%2fpasswd", "%2e%2e/x", "\u0000", "x" * 5000])
def test_no_name_opens_a_file(server, path):
    for base in ("/v1/images/files/", "/v1/models/", "/sdapi/v1/"):
        try:
            refused_ = httpx.get(server[0] + base + path)
        except httpx.InvalidURL:
            continue
        assert refused_.status_code in (404, 405)
        assert "root:" not in refused_.text


def test_bodies_that_are_too_large(server):
    """By what the header says, and where it says nothing by what comes; 100 MB are not read."""
    body = b'{"prompt": "' + b"x" * (2 << 20) + b'"}'
    headers = {"content-type": "application/json"}
    assert "larger than" in refused(httpx.post(server[0] + GENERATIONS, content=body, headers=headers), 413)
    address = urlsplit(server[0])
    with socket.create_connection((address.hostname, address.port)) as raw:
        head = f"POST {GENERATIONS} HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Length: {100 << 20}\r\n\r\n"
        raw.sendall(head.encode())
        assert b" 413 " in raw.recv(100)
    chunk = b"x" * (256 << 10)
    sent = []

    def endless():
        for i in range(400):  # 100 MB
            sent.append(i)
            yield chunk

    with contextlib.suppress(httpx.TransportError):  # the connection may be closed while it sends
        assert httpx.post(server[0] + GENERATIONS, content=endless(), headers=headers).status_code == 413
    assert len(sent) < 400


def test_slow_bodies(server):
    address = urlsplit(server[0])
    with socket.create_connection((address.hostname, address.port)) as raw:
        head = f"POST {GENERATIONS} HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Length: 90\r\n"
        raw.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n{")
        raw.settimeout(30)
        assert b" 408 " in raw.recv(1000)


def test_many_large_bodies_at_once(server):
    """Each within the bound, but not all of them together; their room is free again afterwards."""
    address = urlsplit(server[0])
    size = 900 << 10
    head = f"POST {GENERATIONS} HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Length: {size}\r\n"
    raws = [socket.create_connection((address.hostname, address.port)) for _ in range(5)]
    for raw in raws:
        raw.settimeout(30)
        raw.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + b"x" * (size - 1))
    answers = [raw.recv(100).split()[1] for raw in raws]
    for raw in raws:
        raw.close()
    assert b"429" in answers
    assert b"408" in answers


def test_pages_of_other_sites_and_names_that_point_here(server):
    body = {"prompt": "a castle"}
    assert "other sites" in refused(
        httpx.post(server[0] + GENERATIONS, json=body, headers={"Origin": "https://evil.example"}), 403
    )
    assert "name" in refused(httpx.post(server[0] + GENERATIONS, json=body, headers={"Host": "evil.example"}), 403)
    answer = httpx.options(server[0] + GENERATIONS, headers={"Access-Control-Request-Method": "POST"})
    assert not any(name.startswith("access-control") for name in answer.headers)
    assert httpx.get(f"{server[0]}/healthz", headers={"Origin": server[0]}).status_code == 200


def test_methods_and_paths(server):
    assert refused(httpx.get(server[0] + GENERATIONS), 405)
    assert refused(httpx.get(f"{server[0]}/v2"), 404)
    assert httpx.get(f"{server[0]}/sdapi/v1/none").json()["error"] == "NotFound"
    assert httpx.get(f"{server[0]}/docs").status_code == 200
    assert GENERATIONS in httpx.get(f"{server[0]}/openapi.json").json()["paths"]


@pytest.fixture
def gone(monkeypatch):
    """Set it when the client has gone: images are not finished before."""
    event = threading.Event()

    def held(*args, **how):
        for moment in stepwise.draw_stepwise(*args, **how):
            if moment.finite is not None:
                event.wait(60)
            yield moment

    monkeypatch.setattr("jaxdiff.serving.engine.draw_stepwise", held)
    yield event
    event.set()


def test_a_client_that_has_gone_is_not_drawn_for(server, gone):
    address, engine, _ = server
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(address + GENERATIONS, json={"prompt": "a castle", "n": 6, "steps": 60}, timeout=0.3)
    gone.set()
    end = time.monotonic() + 60
    while (engine._queue or any(not job.future.done() for job in engine._jobs)) and time.monotonic() < end:
        time.sleep(0.02)
    assert not engine._queue
    assert httpx.get(f"{address}/sdapi/v1/progress").json()["state"]["job_count"] == 0


def test_a_stream_that_nobody_reads_any_more(server, gone):
    address, engine, _ = server
    asked = {"prompt": "a castle", "n": 6, "steps": 60, "stream": True, "partial_images": 3}
    with httpx.stream("POST", address + GENERATIONS, json=asked, timeout=120) as answer:
        lines = answer.iter_lines()
        assert next(lines) == "event: image_generation.partial_image", next(lines)
        (job,) = engine.jobs("127.0.0.1")
    assert isinstance(job.future.exception(60), Cancelled)


def test_memory_is_back(tiny, server):
    """Nothing of a request is kept once it is answered."""
    _, engine, _ = server
    image = np.zeros((SIDE, SIDE, 3), np.uint8)
    job = engine.submit(DrawRequest("a castle", steps=2, image=image, strength=1.0))
    job.future.result(120)
    engine.submit(DrawRequest("a castle", steps=2)).future.result(120)  # the thread holds its last batch
    kept = weakref.ref(image)
    del image, job
    end = time.monotonic() + 10
    while kept() is not None and time.monotonic() < end:
        gc.collect()
        time.sleep(0.05)
    assert kept() is None


def test_a_full_queue_says_when_to_come_back(tiny):
    limits = Limits(((SIDE, SIDE),), queue=2, seconds=5)
    with serving(tiny, limits, start=False) as (address, engine, _):
        assert httpx.get(f"{address}/readyz").status_code == 503
        assert httpx.get(f"{address}/healthz").text == "ok"
        waiting = threading.Thread(
            target=lambda: answers.append(httpx.post(address + GENERATIONS, json={"prompt": "a", "n": 2}, timeout=60))
        )
        answers = []
        waiting.start()
        while len(engine._queue) < 2:
            time.sleep(0.01)
        full = httpx.post(address + GENERATIONS, json={"prompt": "a castle"})
        refused(full, 429)
        assert int(full.headers["retry-after"]) >= 1
        assert httpx.post(address + TXT2IMG, json={"prompt": "a castle"}).json()["error"] == "QueueFull"
        waiting.join(60)
        assert "within 5 s" in refused(answers[0], 504)


def test_the_key(tiny):
    with serving(tiny, start=False, api_key=KEY, hosts=None) as (address, *_):
        models = f"{address}/v1/models"
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {KEY}"},
                        {"Authorization": f"Bearer {KEY}x"}):  # fmt: skip
            answer = httpx.get(models, headers=headers)
            refused(answer, 401)
            assert answer.headers["www-authenticate"].startswith("Basic")
        assert httpx.get(models, headers={"Authorization": f"Bearer {KEY}"}).status_code == 200
        assert httpx.get(models, auth=("anybody", KEY)).status_code == 200
        for path in ("/metrics", "/docs", "/openapi.json", "/sdapi/v1/options"):
            assert httpx.get(address + path).status_code == 401
        assert httpx.get(f"{address}/healthz").status_code == 200
        assert password("Basic !") == password("") == b""


def test_files_are_kept_when_two_threads_make_room_at_once():
    """Endpoints run in threads. Two of them that drop the same oldest file must not drop the next one too."""
    both = threading.Barrier(2)

    class Slow(bytes):  # its size is asked for between the choice of what is dropped and the dropping
        def __len__(self) -> int:
            with contextlib.suppress(threading.BrokenBarrierError):
                both.wait(0.2)
            return super().__len__()

    files = Files(seconds=100, room=100)
    both.abort()
    first, second = files.add(Slow(100), "png"), files.add(b"", "png")
    both.reset()
    files._room = 0
    threads = [threading.Thread(target=files.get, args=(first,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert files.get(second) == ("png", b"")


def test_files_go_after_some_time_and_before_memory_does():
    files = Files(seconds=0.05, room=100)
    names = [files.add(bytes(40), "png") for _ in range(3)]
    assert files.get(names[0]) is None  # for the third one
    assert files.get(names[2]) == ("png", bytes(40))
    time.sleep(0.06)
    assert files.get(names[2]) is None
    assert len(set(names)) == 3
    assert all(len(name) > 30 for name in names)
