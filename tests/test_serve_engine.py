"""The engine of the server: batches of what fits, a bound, cancelling, previews, and mistakes that are one client's."""

import dataclasses
import threading
import time

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxdiff
from jaxdiff.errors import ArgumentError
from jaxdiff.io.lora import init_lora, save_lora
from jaxdiff.serving import engine as engine_file
from jaxdiff.serving.engine import Engine
from jaxdiff.serving.loras import Loras, lora_files
from jaxdiff.serving.requests import Cancelled, DrawRequest, EnlargeRequest, Limits, QueueFull, Stopping, TooVaried
from tests.support.comparison import levels
from tests.support.tiny import SIDE, tiny_upscaler

LIMITS = Limits(((SIDE, SIDE),), steps=20, images=6, queue=8, prompt=200)
WAIT = 120  # seconds, on a busy machine


@pytest.fixture
def new_engine(tiny):
    """Makes engines, which are stopped at the end, and what each of them reports."""
    made = []

    def new(start=True, limits=LIMITS, warm=False, **more):
        events = []
        more = {"batch_sizes": (1, 4), "window": 0.0, "observe": lambda *event: events.append(event)} | more
        engine = Engine(*tiny, limits, **more)
        if not warm:
            engine._warm_up.clear()
        made.append(engine)
        if start:
            engine.start()
        return engine, events

    yield new
    for engine in made:
        engine.stop()
        assert engine._thread.ident is None or engine.join(WAIT)


def castle(**more):
    return DrawRequest(**({"prompt": "a castle", "steps": 3, "seed": 7} | more))


def images(job):
    return np.stack(job.future.result(WAIT))


def test_requests_that_fit_are_drawn_at_once_and_as_alone(tiny, new_engine):
    """Prompts, seeds and scales of one batch differ; a request with other steps has a batch of its own."""
    engine, events = new_engine(start=False)
    requests = [castle(), castle(steps=2), castle(seed=20, n=2), castle(prompt="a red dragon", guidance_scale=3.0)]
    jobs = [engine.submit(request) for request in requests]
    engine.start()
    drawn = [images(job) for job in jobs]
    assert [number for what, number in events if what == "batch"] == [4, 1]
    for request, found in zip(requests, drawn, strict=True):
        more = {"steps": request.steps, "seed": request.seed, "guidance_scale": request.guidance_scale}
        alone = jaxdiff.generate(*tiny, [request.prompt] * request.n, **more)
        assert found.shape == alone.shape
        assert levels(found, alone) <= 1
    assert jobs[0].fraction == 1


def test_images_wait_a_moment_for_others(new_engine):
    engine, events = new_engine(window=60.0)
    jobs = [engine.submit(castle(seed=seed)) for seed in range(4)]  # the last one fills the batch
    for job in jobs:
        images(job)
    assert [number for what, number in events if what == "batch"] == [4]


def test_the_only_client_waits_for_nobody(new_engine, monkeypatch):
    """Once nobody else has asked for a while; a second one at the same time makes both wait again."""
    monkeypatch.setattr(engine_file, "SOLO_AFTER", 0.0)
    engine, events = new_engine(window=60.0)
    assert images(engine.submit(castle())).shape == (1, SIDE, SIDE, 3)
    monkeypatch.setattr(engine_file, "SOLO_AFTER", 1000.0)
    jobs = [engine.submit(castle(seed=seed)) for seed in range(4)]
    for job in jobs:
        images(job)
    assert [number for what, number in events if what == "batch"] == [1, 4]


def test_a_matrix_of_prompts(new_engine):
    """In order, seeds counting up, in one batch; each image as alone."""
    engine, events = new_engine(start=False)
    job = engine.submit(castle(prompt="a {red|blue} {castle|house}", matrix=True))
    assert job.prompts == ["a red castle", "a red house", "a blue castle", "a blue house"]
    assert job.seeds == [7, 8, 9, 10]
    engine.start()
    together = images(job)
    assert [number for what, number in events if what == "batch"] == [4]
    alone = [images(engine.submit(castle(prompt=p, seed=7 + i)))[0] for i, p in enumerate(job.prompts)]
    assert levels(together, np.stack(alone)) <= 1
    twice = engine.submit(castle(prompt="a {red|red} castle", n=2, matrix=True))
    assert twice.prompts == ["a red castle"] * 4
    assert levels(images(twice)[0], together[0]) <= 1


def test_random_seeds(new_engine):
    engine, _ = new_engine()
    one, other = (engine.submit(castle(seed=None)) for _ in range(2))
    assert one.seeds != other.seeds
    assert levels(images(one), images(other)) > 10


def test_the_queue_has_a_bound_and_frees_what_nobody_waits_for(new_engine):
    engine, _ = new_engine(start=False)
    jobs = [engine.submit(castle(n=4)) for _ in range(2)]
    with pytest.raises(QueueFull, match="try again in"):
        engine.submit(castle())
    jobs[0].cancel()
    last = engine.submit(castle())
    engine.start()
    with pytest.raises(Cancelled):
        jobs[0].future.result(WAIT)
    assert images(last).shape == (1, SIDE, SIDE, 3)
    assert images(jobs[1]).shape == (4, SIDE, SIDE, 3)
    assert not engine._queue


def test_what_would_be_compiled_for_has_a_bound(new_engine, monkeypatch):
    """Other sizes, schedulers and forms of prompts count; other words, steps, seeds and scales do not."""
    engine, _ = new_engine(start=False, limits=dataclasses.replace(LIMITS, queue=50, programs=3))
    for seed, more in enumerate(({}, {"steps": 5}, {"guidance_scale": 4.0}, {"prompt": "a red dragon", "n": 2})):
        engine.submit(castle(seed=seed, **more))
    engine.submit(castle(scheduler="euler"))
    engine.submit(castle(guidance_scale=1.0))
    for more in ({"scheduler": "heun"}, {"hires": 2.0}, {"clip_skip": 1}, {"prompt": "a BREAK b"}):
        with pytest.raises(TooVaried, match="try again in 3600 s"):
            engine.submit(castle(**more))
    engine.submit(castle(scheduler="euler", seed=3))
    monkeypatch.setattr(engine_file, "HOUR", 0.0)
    engine.submit(castle(scheduler="heun"))


def test_enlarging(tiny, new_engine):
    """As the network does it alone, but for the border, where sides are filled up; a job that has ended stops it."""
    upscaler = tiny_upscaler()
    full = jaxdiff.with_upscaler(*tiny, upscaler)
    image = np.random.default_rng(0).integers(0, 256, (40, 64, 3), np.uint8)
    events = []
    engine = Engine(*full, LIMITS, observe=lambda *event: events.append(event))
    engine._warm_up.clear()
    gone = engine.enlarge(EnlargeRequest(image, 4.0))
    gone.cancel()
    job = engine.enlarge(EnlargeRequest(image, 4.0))
    engine.start()
    (larger,) = job.future.result(WAIT)
    alone = jaxdiff.upscale(*upscaler, image, scale=4)
    assert larger.shape == alone.shape == (160, 256, 3)
    border = 4 * upscaler[0].config.reach
    assert levels(larger[:-border], alone[:-border]) <= 1
    assert engine.enlarge(EnlargeRequest(image, 1.5)).future.result(WAIT)[0].shape == (60, 96, 3)
    ended = engine.enlarge(EnlargeRequest(np.zeros((600, 600, 3), np.uint8), 4.0))
    while not ended.started:
        time.sleep(0.001)
    ended.cancel()
    engine.stop()
    assert engine.join(WAIT)
    assert ("images", 1) in events


def test_cancelling_ends_the_drawing(new_engine):
    engine, events = new_engine()
    reached, job = threading.Event(), []

    def preview(index, fraction, image):
        job[0].cancel()
        reached.set()

    with engine._changed:  # so that the job is known before its first preview
        job.append(engine.submit(castle(steps=12), previews=3, on_preview=preview))
    assert reached.wait(WAIT)
    with pytest.raises(Cancelled):
        job[0].future.result(WAIT)
    assert images(engine.submit(castle())).shape == (1, SIDE, SIDE, 3)
    assert ("cancelled", 1) in events
    assert job[0].fraction < 1


def test_previews_come_evenly_and_near_the_image(new_engine):
    engine, _ = new_engine()
    shown = []
    job = engine.submit(castle(steps=12, n=2), previews=3, on_preview=lambda *given: shown.append(given))
    final = images(job)
    for index in (0, 1):
        mine = [(fraction, image) for i, fraction, image in shown if i == index]
        assert [fraction for fraction, _ in mine] == [3 / 12, 6 / 12, 9 / 12]
        assert levels(mine[0][1], final[index]) > levels(mine[-1][1], final[index]) > 0


@pytest.mark.parametrize(
    ("request_", "named"),
    [
        (castle(width=SIDE * 2), "size"),
        (castle(steps=21), "steps"),
        (castle(steps=0), "steps"),
        (castle(n=7), "n"),
        (castle(n=0), "n"),
        (castle(seed=-1), "seed"),
        (castle(seed=2**32), "seed"),
        (castle(guidance_scale=1e300), "guidance_scale"),
        (castle(guidance_scale=float("nan")), "guidance_scale"),
        (castle(prompt="x" * 201), "prompt"),
        (castle(prompt="half \ud800 pair"), "prompt"),
        (castle(prompt="<lora:../../etc/passwd:1>"), "prompt"),
        (castle(prompt="<lora:x:heavy>"), "prompt"),
        (castle(prompt="[" + "|".join("abcdefghijk") + "]", steps=12), "prompt"),
        (castle(prompt=" BREAK ".join("abcdefghijk")), "prompt"),
        (castle(negative_prompt="x" * 201), "negative_prompt"),
        (castle(scheduler="fastest"), "scheduler"),
        (castle(prompt="{a|b|c|d|e|f|g}", matrix=True), "prompt"),
        (castle(prompt="{a|b}", n=4, matrix=True), "prompt"),
        (castle(prompt="{a|b", matrix=True), "prompt"),
        (castle(prompt="__../../etc/passwd__ __colour__", matrix=True), "prompt"),
        (castle(mask=np.ones((SIDE, SIDE), bool)), "mask"),
        (castle(control_images=(np.zeros((SIDE, SIDE, 3), np.uint8),)), "control_images"),
        (castle(image=np.zeros((SIDE, SIDE, 3), np.uint8), strength=-1.0), "strength"),
    ],
)
def test_arguments_that_cannot_be_right_are_named(new_engine, request_, named):
    engine, _ = new_engine(start=False)
    with pytest.raises(ArgumentError) as e:
        engine.submit(request_)
    assert e.value.argument == named
    assert not engine._queue


def test_one_mistake_ends_no_other_job(new_engine, monkeypatch):
    engine, _ = new_engine()
    draw = engine_file.draw_stepwise

    def failing(model, params, request, **more):
        if "a red dragon" in request.prompts:
            raise RuntimeError("of the device")
        return draw(model, params, request, **more)

    monkeypatch.setattr(engine_file, "draw_stepwise", failing)
    bad, good = engine.submit(castle(prompt="a red dragon", steps=2)), engine.submit(castle())
    with pytest.raises(RuntimeError, match="of the device"):
        bad.future.result(WAIT)
    assert images(good).shape == (1, SIDE, SIDE, 3)


def test_a_batch_that_memory_is_too_small_for_is_halved(new_engine, monkeypatch):
    engine, _ = new_engine(start=False, batch_sizes=(1, 2, 4))
    draw, sizes = engine_file.draw_stepwise, []

    def failing(model, params, request, **more):
        sizes.append(len(request.prompts))
        if len(request.prompts) > 1:
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return draw(model, params, request, **more)

    monkeypatch.setattr(engine_file, "draw_stepwise", failing)
    job = engine.submit(castle(n=4))
    engine.start()
    assert images(job).shape == (4, SIDE, SIDE, 3)
    assert sizes == [4, 2, 1, 1, 2, 1, 1]


def test_stopping_delivers_what_is_begun_and_tells_the_others(new_engine):
    engine, _ = new_engine()
    begun = threading.Event()
    first = engine.submit(castle(n=6, steps=12), previews=1, on_preview=lambda *_: begun.set())
    assert begun.wait(WAIT)
    waiting = engine.submit(castle())
    engine.stop()
    with pytest.raises(Stopping):
        waiting.future.result(WAIT)
    assert images(first).shape == (6, SIDE, SIDE, 3)
    assert engine.join(WAIT)
    with pytest.raises(Stopping):
        engine.submit(castle())


def test_ready_after_the_first_program_and_nothing_is_compiled_later(new_engine, compilations):
    engine, _ = new_engine(start=False, warm=True)
    assert not engine.ready.is_set()
    engine.start()
    assert engine.ready.wait(WAIT)
    while engine._warm_up:
        time.sleep(0.01)
    first = engine.submit(castle(n=3))  # noise of so many images
    images(first)
    before = len(compilations)
    later = [engine.submit(castle(prompt="a red dragon", seed=i, steps=5 + i, guidance_scale=4.0)) for i in range(3)]
    for job in later:
        images(job)
    assert len(compilations) == before


def test_loras_that_prompts_name(tiny, new_engine, tmp_path):
    model, params = tiny
    fresh = init_lora(model, params, 2, targets=("unet", "text_encoder"), key=jax.random.key(0))
    lora = {name: dataclasses.replace(f, up=f.up + 0.3) for name, f in fresh.items()}
    (tmp_path / "style").mkdir()
    save_lora(tmp_path / "style" / "detail.safetensors", model, lora)
    files = lora_files(tmp_path)
    assert list(files) == ["style/detail"]
    engine, events = new_engine(start=False, loras=Loras(model, params, files))
    plain = engine.submit(castle())
    styled = [engine.submit(castle(prompt=f"a castle <lora:style/detail:{weight}>")) for weight in (0.8, 0)]
    engine.start()
    merged = jaxdiff.load_lora(model, params, files["style/detail"], scale=0.8)
    assert levels(images(styled[0]), jaxdiff.generate(model, merged, "a castle", steps=3, seed=7)) <= 1
    assert levels(images(styled[1]), images(plain)) <= 1
    assert levels(images(styled[0]), images(plain)) > 1
    assert [number for what, number in events if what == "batch"] == [1, 1, 1]


def test_loras_are_found_as_sample_py_finds_them(tiny, tmp_path, caplog):
    """By the end of their path, by the name in their metadata, with other suffixes; what does not fit is said."""
    model, params = tiny
    save_lora(tmp_path / "a.safetensors", model, init_lora(model, params, 2, key=jax.random.key(0)))
    tensors = load_file(tmp_path / "a.safetensors")
    (tmp_path / "sub").mkdir()
    for path, name in (("sub/ink.safetensors", "my ink"), ("b/ink.sft", "other"), ("old.ckpt", "old")):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        save_file(tensors, tmp_path / path, {"ss_output_name": name})
    save_file({"lora_unet_x.lora_up.weight": np.ones((2, 2), np.float32)}, tmp_path / "xl.safetensors")
    (tmp_path / "damaged.pt").write_bytes(b"no weights")
    loras = Loras(model, params, lora_files(tmp_path))
    assert list(loras.files) == ["a", "b/ink", "old", "sub/ink", "xl"]
    assert "damaged.pt" in caplog.text
    assert "left out of --lora_dir" in caplog.text
    for name, file in {"sub/ink": "sub/ink.safetensors", "my ink": "sub/ink.safetensors", "old": "old.ckpt"}.items():
        assert loras.split(f"a <lora:{name}:0.5>b") == ("a b", ((tmp_path / file, 0.5, 0.5),))
    for name, sentence in {
        "ink": r"names the LoRA 'ink', which may be several: write <lora:b/ink> or <lora:sub/ink>\.",
        "gone": r"names the LoRA 'gone', which is not available; known are a, b/ink, old, sub/ink, xl\.",
        "xl": r"names the LoRA 'xl', which does not fit this model\.",
    }.items():
        with pytest.raises(ArgumentError, match=f"^prompt {sentence}$"):
            loras.split(f"a <lora:{name}>")
    assert "xl.safetensors" in caplog.text
