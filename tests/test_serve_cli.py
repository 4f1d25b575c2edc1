"""The command jaxdiff-serve: its flags, and how it ends."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from jaxdiff.cli import serve
from jaxdiff.cli.errors import UsageError
from jaxdiff.cli.serve_options import ALL, flags_document, parse, parse_sizes
from tests.support.tiny import SIDE

ROOT = Path(__file__).parent.parent


def test_the_documentation_is_the_table():
    """docs/serve-flags.md is made by `python -m jaxdiff.cli.serve_options`."""
    assert (ROOT / "docs" / "serve-flags.md").read_text(encoding="utf-8") == flags_document()
    assert "api_key" in ALL


def test_sizes_and_key(monkeypatch):
    monkeypatch.setenv("JAXDIFF_API_KEY", "from-the-environment")
    f = parse(["serve", "--sizes=512x512, 768x512,512x512"])
    assert parse_sizes(f) == ((512, 512), (768, 512))
    assert f.api_key == "from-the-environment"
    assert parse(["serve", "--host=0.0.0.0"]).host == "0.0.0.0"


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--host=0.0.0.0"], "--api_key"),
        (["--host=::"], "--api_key"),
        (["--api_key=short"], "8"),
        (["--sizes=512"], "--sizes"),
        (["--sizes=512x-1"], "--sizes"),
        (["--port=70000"], "port"),
        (["--queue=0"], "queue"),
        (["--steps=200"], "--max_steps"),
        (["--time_limit=nan"], "time_limit"),
        (["a castle"], "belongs to no flag"),
    ],
)
def test_flags_that_cannot_be_right(flags, word, monkeypatch):
    monkeypatch.delenv("JAXDIFF_API_KEY", raising=False)
    with pytest.raises(UsageError, match=word):
        parse(["serve", *flags])


@pytest.mark.parametrize("flag", ["--lora=missing.safetensors", "--lora_dir=missing", "--controlnet=missing"])
def test_files_that_are_not_there(flag, capsys):
    pytest.importorskip("uvicorn")
    assert serve.main(["serve", flag]) == 2
    assert f"{flag.split('=')[0]}: missing" in capsys.readouterr().err


def test_an_upscaler_that_is_none(tiny_folder, capsys):
    """It is said before the model's weights are read."""
    pytest.importorskip("uvicorn")
    assert serve.main(["serve", "--port=0", f"--model={tiny_folder}", "--upscaler=missing"]) == 2
    assert "--upscaler: missing is neither a file nor a bundled upscaler" in capsys.readouterr().err


def test_sizes_are_those_of_the_model(tiny):
    f = parse(["serve"])
    chosen = serve.sizes(f, tiny[0])
    assert chosen[0] == (SIDE, SIDE)
    assert all(abs(w * h - SIDE**2) < 0.3 * SIDE**2 and w % 2 == h % 2 == 0 for w, h in chosen)
    with pytest.raises(UsageError, match="multiples of 2"):
        serve.sizes(parse(["serve", "--sizes=17x16"]), tiny[0])
    with pytest.raises(UsageError, match="--sizes: height 99998 and width 99998 take at least"):
        serve.sizes(parse(["serve", "--sizes=99998x99998"]), tiny[0])
    assert serve.batch_sizes(f, tiny[0], (SIDE, SIDE)) == [1, 2, 4]
    assert serve.batch_sizes(parse(["serve", "--batch_size=9"]), tiny[0], (SIDE, SIDE)) == [1, 2, 4, 8]


def test_steps_are_those_of_the_model(tiny):
    model = dataclasses.replace(tiny[0], options=dataclasses.replace(tiny[0].options, steps=4))
    asked = ([], ["--steps=9"], ["--max_steps=3"])
    assert [serve.default_steps(parse(["serve", *flags]), model) for flags in asked] == [4, 9, 3]
    assert serve.default_steps(parse(["serve"]), tiny[0]) == 25


def test_a_port_that_is_taken_is_said_before_the_model_is_read(capsys, monkeypatch):
    pytest.importorskip("uvicorn")
    with serve.listen(parse(["serve", "--port=0"])) as taken:
        assert serve.main(["serve", f"--port={taken.getsockname()[1]}", "--model=missing"]) == 1
    assert "stop what listens there" in capsys.readouterr().err


@pytest.mark.slow
def test_sigterm_delivers_what_is_drawn_and_tells_the_others(tiny_folder):
    """The real process: ready, drawing one request and queueing another when the signal comes; exit code 0."""
    pytest.importorskip("uvicorn")
    flags = [f"--model={tiny_folder}", "--port=0", "--max_steps=900", "--batch_size=1", f"--sizes={SIDE}x{SIDE}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "jaxdiff.cli.serve", *flags],
        cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        address = process.stdout.readline().strip()
        assert address.startswith("http://127.0.0.1:")

        def get(path):
            try:
                with urllib.request.urlopen(address + path, timeout=60) as answer:
                    return answer.status, answer.read().decode()
            except urllib.error.HTTPError as e:
                return e.code, e.read().decode()

        end = time.monotonic() + 300
        while get("/readyz")[0] != 200:
            assert time.monotonic() < end
            time.sleep(0.1)
        answers = {}

        def ask(name, n):
            body = json.dumps({"prompt": "a castle", "steps": 900, "n": n}).encode()
            headers = {"Content-Type": "application/json"}
            try:
                with urllib.request.urlopen(
                    urllib.request.Request(f"{address}/v1/images/generations", body, headers), timeout=300
                ) as answer:
                    answers[name] = answer.status, json.load(answer)
            except urllib.error.HTTPError as e:
                answers[name] = e.code, json.load(e)

        asking = [threading.Thread(target=ask, args=args) for args in (("drawn", 3), ("waiting", 1))]
        asking[0].start()
        while '"progress":0.0,' in get("/sdapi/v1/progress?skip_current_image=true")[1]:
            assert "drawn" not in answers, answers
            time.sleep(0.02)
        asking[1].start()
        while "jaxdiff_queue_images 3.0" not in get("/metrics")[1]:  # two of the first, and one
            assert "waiting" not in answers, answers
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        for thread in asking:
            thread.join(300)
        assert answers["drawn"][0] == 200
        assert len(answers["drawn"][1]["data"]) == 3
        assert answers["waiting"][0] == 503
        assert "stopping" in answers["waiting"][1]["error"]["message"]
        assert process.wait(120) == 0
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()
