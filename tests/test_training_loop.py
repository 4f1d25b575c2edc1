"""The loop: learning, going on, stopping, reporting; on a stage that compiles in no time."""

import gc
import json
import os
import re
import signal
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxdiff.data.captioned import captioned_data
from jaxdiff.training.checkpoint import CheckpointError, Checkpoints
from jaxdiff.training.loop import TrainingError, fit
from jaxdiff.training.memory_plan import bytes_each
from jaxdiff.training.optimizer import optimizer
from jaxdiff.training.progress import Report
from jaxdiff.training.trackers import TensorBoard, TrackedImages
from jaxdiff.training.train_step import abstract_state, cast_frozen, init_state, make_train_step
from jaxdiff.training.workdir import WorkdirError
from tests.support.batches import FromMemory
from tests.support.line import LINE, OFFSET, line_data, linear_stage, one_device, same
from tests.support.stages import BATCH, options
from tests.support.tiny import SIDE


def test_fit_learns_and_leaves_what_is_frozen(tmp_path, capsys):
    o = options(steps=200, batch_size=5, learning_rate=0.05, log_every=100, ema_decay=0.9)
    result = fit(linear_stage(), LINE, FromMemory(line_data(), 5, 0), o, tmp_path, mesh=one_device())
    # Adam's steps are of the size of the rate, and the noise moves it by as much.
    np.testing.assert_allclose(result.params["line"]["w"], [1.0, -2.0, 0.5], atol=0.1)
    assert result.step == 200
    assert result.params["offset"] == 0
    assert LINE["line"]["w"].sum() == 0  # the caller's parameters are still there
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["line", "step 100/200", "step 200/200"]
    assert lines[0] == "line: compiling the training step, which may take some minutes."
    assert all(name in lines[1] for name in ("loss", "grad_norm", "learning_rate", "images_per_second", "left"))
    assert list((tmp_path / "tb").iterdir())


def test_what_is_frozen_may_be_kept_in_half_of_the_memory(tmp_path):
    """1 + 2**-12 is 1 in bfloat16, so that the first step's bias tells the type; exports have it as it was."""
    params = {**LINE, "offset": np.float32([1 + 2**-12])}
    batches = FromMemory(line_data(), 5, 0)

    def bias(**kept) -> float:
        folder = tmp_path / str(len(kept))
        o = options(steps=1, batch_size=5, log_every=1, **kept)
        result = fit(linear_stage(), params, batches, o, folder, mesh=one_device())
        assert result.params["offset"] is params["offset"]
        return json.loads((folder / "metrics.jsonl").read_text())["bias"]

    assert bias() == 1 + 2**-12
    assert bias(frozen_dtype="bfloat16") == 1
    half = {"w": np.zeros(2, np.float16), "count": np.zeros(2, np.int32)}
    assert {k: v.dtype for k, v in cast_frozen(half, options()).items()} == {"w": np.float16, "count": np.int32}


def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(tmp_path):
    seen: dict[str, list] = {"unbroken": [], "broken": []}

    def run(name, folder, steps):
        stage = linear_stage()
        stage = stage._replace(prepare=lambda batch: seen[name].append(batch["index"].tolist()) or batch)
        o = options(steps=steps, batch_size=3, schedule="constant", checkpoint_every=4, ema_decay=0.9)
        return fit(stage, LINE, FromMemory(line_data(), 3, 7), o, tmp_path / folder, mesh=one_device())

    unbroken = run("unbroken", "a", 12)
    run("broken", "b", 6)
    broken = run("broken", "b", 12)
    assert same(unbroken, broken)
    assert seen["unbroken"] == seen["broken"]


def test_a_resumed_run_goes_on_in_the_folder_of_images(tmp_path):
    lines = [{"file_name": f"{i}.png", "text": [f"a {i}", f"the {i}"]} for i in range(7)]
    for i, line in enumerate(lines):
        Image.fromarray(np.full((SIDE, SIDE, 3), 30 * i, np.uint8)).save(tmp_path / line["file_name"])
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))

    def run(folder, steps):
        seen = []

        def prepare(batch):
            seen.append(list(batch["text"]))
            tones = batch["image"][:, 0, 0] / 255.0
            return {"x": tones.astype(np.float32), "y": tones[:, 0].astype(np.float32), "index": np.arange(len(tones))}

        batches = captioned_data(tmp_path, 3, SIDE, seed=5, threads=2)
        o = options(steps=steps, batch_size=3)
        return fit(
            linear_stage()._replace(prepare=prepare), LINE, batches, o, tmp_path / folder, mesh=one_device()
        ), seen

    unbroken, seen = run("a", 6)
    _, first = run("b", 2)
    broken, rest = run("b", 6)
    assert first + rest == seen
    assert same(unbroken, broken)


def test_sigterm_saves_and_the_same_call_goes_on(tmp_path):
    def stop(step, params):
        if step:
            os.kill(os.getpid(), signal.SIGTERM)
        return {}

    before = signal.getsignal(signal.SIGTERM)

    def run(folder, on_eval=None):
        o = options(steps=8, batch_size=3, eval_every=3)
        return fit(
            linear_stage(),
            LINE,
            FromMemory(line_data(), 3, 7),
            o,
            tmp_path / folder,
            mesh=one_device(),
            on_eval=on_eval,
        )

    stopped = run("b", stop)
    assert stopped.step == 3
    assert signal.getsignal(signal.SIGTERM) == before
    with Checkpoints(tmp_path / "b" / "checkpoints") as checkpoints:
        assert checkpoints.latest == 3
    assert same(run("b"), run("a"))


def test_evaluation_gets_every_parameter_and_is_reported(tmp_path, capsys):
    seen = []

    def on_eval(step, params):
        seen.append((step, sorted(params)))
        return {"score": 0.5}

    o = options(steps=5, batch_size=3, eval_every=2, log_every=100)
    fit(linear_stage(), LINE, FromMemory(line_data(), 3, 7), o, tmp_path, mesh=one_device(), on_eval=on_eval)
    assert seen == [(step, ["line", "offset"]) for step in (0, 2, 4, 5)]
    assert "score 0.5" in capsys.readouterr().out


def test_a_terminal_gets_a_bar_with_the_numbers(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    o = options(steps=6, batch_size=3, log_every=2)
    score = {"score": 0.5}
    fit(linear_stage(), LINE, FromMemory(line_data(), 3, 7), o, tmp_path, mesh=one_device(), on_eval=lambda *_: score)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().out)
    assert "6/6" in shown
    assert "images/s" in shown
    assert "line: step 6: score 0.5" in shown


def test_the_clock_stands_still_between_intervals(tmp_path, capsys):
    """Images a second are those of the steps, not of evaluations."""
    report = Report((), "line", 0, 6, batch_size=10, log_every=3)
    means = []
    with report:
        for step in range(1, 7):
            time.sleep(0.02)
            means.append(report.step(step, {"loss": jnp.float32(step)}))
            if step == 1:
                report.start_clock()
            if step == 3:
                time.sleep(0.5)
                report.start_clock()
    assert [m and m["loss"] for m in means] == [None, None, 2.0, None, None, 5.0]
    # At most 10 images in 0.02 s; 10 in 0.27 s if the half second counted.
    for mean in (means[2], means[5]):
        assert 60 < mean["images_per_second"] <= 500
    assert "left" in capsys.readouterr().out


def events(folder) -> list:
    """What lies in a folder of TensorBoard files: records of a length in 8 bytes, its sum in 4, the event, its sum."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            found.append(Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    return found


def test_tensorboard_gets_numbers_images_and_captions_at_once(tmp_path):
    tracker = TensorBoard(tmp_path / "tb", 4)
    tracker.write(5, {"loss": 0.5, "bad": float("nan")})
    tracker.draw(6, "samples", TrackedImages(np.zeros((1, 8, 8, 3), np.uint8), ["a castle"]))
    header, restart, loss, image, text = events(tmp_path / "tb")  # nothing waits for the end
    tracker.close()
    assert header.file_version == "brain.Event:2"
    assert (restart.step, restart.session_log.status) == (5, restart.session_log.START)  # hides what came after 4
    assert (loss.step, loss.summary.value[0].tag, loss.summary.value[0].simple_value) == (5, "loss", 0.5)
    assert (image.step, image.summary.value[0].tag, image.summary.value[0].image.width) == (6, "samples/0", 8)
    assert text.summary.value[0].tensor.string_val == [b"0. a castle"]


def test_tensorboard_hides_what_a_run_that_began_anew_had_written_before(tmp_path):
    TensorBoard(tmp_path / "tb", 0).close()
    _, restart = events(tmp_path / "tb")
    assert (restart.step, restart.session_log.status) == (0, restart.session_log.START)


def test_a_full_disk_under_tensorboards_files_is_said_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("tensorboardX.record_writer.open_file", lambda _: open("/dev/full", "wb"))  # noqa: SIM115
    tracker = TensorBoard(tmp_path / "tb", 0)
    image = TrackedImages(np.zeros((1, 8, 8, 3), np.uint8))
    for call in (lambda: tracker.write(1, {"loss": 1.0}), lambda: tracker.draw(1, "x", image), tracker.close):
        with pytest.raises(WorkdirError, match=r"tb cannot be written \(No space left on device\): once it can"):
            call()


def spoilt_line(steps: range, key: str = "x") -> FromMemory:
    """Batches of which those of some steps, counted from 1, hold what is no number."""

    class Spoilt(FromMemory):
        def __iter__(self):
            return Spoilt(line_data(), 3, 7)

        def __next__(self):
            batch = super().__next__()
            if self.get_state()["next"] in steps:
                batch[key] = np.full_like(batch[key], np.inf)
            return batch

    return Spoilt(line_data(), 3, 7)


def test_an_update_that_is_not_finite_leaves_the_state_but_for_the_step(tmp_path, capsys):
    o = options(steps=5, batch_size=3, log_every=5)
    clean = fit(linear_stage(), LINE, FromMemory(line_data(), 3, 7), o, tmp_path / "a", mesh=one_device())
    capsys.readouterr()
    spoilt = fit(linear_stage(), LINE, spoilt_line(range(3, 4)), o, tmp_path / "b", mesh=one_device())
    assert "1 of the 5 updates up to step 5 skipped" in capsys.readouterr().out
    assert np.isfinite(spoilt.params["line"]["w"]).all()
    assert not same(clean, spoilt)
    line = json.loads((tmp_path / "b" / "metrics.jsonl").read_text())
    assert line["skipped"] == 1
    assert np.isfinite([line["loss"], line["grad_norm"]]).all()  # means of the others

    mesh = one_device()
    state = init_state({"line": LINE["line"]}, optimizer(o), mesh)
    before = jax.device_get(state)
    step = make_train_step(linear_stage().loss, o, mesh, state)
    batch = {**{k: v[:3] for k, v in line_data().items()}, "y": np.asarray([np.nan, 0, 0], np.float32)}
    after, metrics = step(state, {"offset": LINE["offset"]}, batch)
    assert (int(after.step), int(metrics["skipped"])) == (1, 1)
    assert same(after._replace(step=before.step), before)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_learning_rate_that_is_logged_is_the_one_used_though_updates_were_skipped(name):
    o = options(optimizer=name, warmup_steps=2, learning_rate=0.5)
    state = init_state({"w": np.ones((2, 2), np.float32), "b": np.ones(2, np.float32)}, optimizer(o), one_device())
    step = make_train_step(
        lambda p, batch, _: ((p["w"] * batch["x"]).mean() + p["b"].mean(), {}), o, one_device(), state
    )
    rates = []
    for x in (np.nan, 1.0, 1.0, np.nan, 1.0):
        before = jax.device_get(state.params)
        state, metrics = step(state, {}, {"x": np.float32(x)})
        rates.append(float(metrics["learning_rate"]))
        assert same(before, state.params) == (np.isnan(x) or rates[-1] == 0)
    assert rates == [0, 0, 0.25, 0.5, 0.5]


def test_a_step_takes_its_batch_in_as_many_parts_as_it_is_told():
    def seen(parts: int) -> float:
        o = options(accumulate=parts)
        state = init_state({"w": np.ones(2, np.float32)}, optimizer(o), one_device())
        step = make_train_step(
            lambda p, batch, keys: (p["w"].sum(), {"at_once": 1.0 * len(keys)}), o, one_device(), state
        )
        return float(step(state, {}, {"x": np.zeros(BATCH)})[1]["at_once"])

    assert [seen(parts) for parts in (1, 2, BATCH)] == [BATCH, BATCH / 2, 1]


def test_too_many_updates_that_are_not_finite_end_the_run_and_keep_the_last_good_checkpoint(tmp_path):
    o = options(steps=20, batch_size=3, checkpoint_every=1, keep_checkpoints=2, max_skipped=4)
    with pytest.raises(TrainingError, match=r"4 updates in a row, up to step 9 .* last checkpoint is of step 5"):
        fit(linear_stage(), LINE, spoilt_line(range(6, 99)), o, tmp_path, mesh=one_device())
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.latest == 5


def test_a_run_that_starts_from_what_is_not_finite_is_refused(tmp_path):
    bad = {**LINE, "line": {"w": np.asarray([0, np.nan, 0], np.float32)}}
    with pytest.raises(TrainingError, match="line to start from"):
        fit(linear_stage(), bad, FromMemory(line_data(), 3, 7), options(batch_size=3), tmp_path, mesh=one_device())


def test_a_leap_of_the_loss_is_told(capsys):
    with Report((), "line", 0, 60, batch_size=1, log_every=10) as report:
        for step in range(1, 61):
            loss = 9.0 if step == 47 else 1.0 + 0.1 * np.sin(step)
            report.step(step, {"loss": jnp.float32(loss)})
    told = [line for line in capsys.readouterr().out.splitlines() if "jumps" in line]
    assert len(told) == 1
    assert "jumps to 9 at step 47" in told[0]


@pytest.mark.slow
def test_going_on_holds_one_state_on_the_devices(tmp_path, monkeypatch):
    params = {"line": {"w": np.zeros(3, np.float32), "unused": np.zeros((256, 256), np.float32)}, **OFFSET}
    held: list[int] = []
    restore = Checkpoints.restore

    def watched(self, like):
        held.append(live_bytes())
        restored = restore(self, like)
        held.append(live_bytes())
        return restored

    monkeypatch.setattr(Checkpoints, "restore", watched)
    before = live_bytes()
    for steps in (1, 2):
        o = options(steps=steps, batch_size=3)
        fit(linear_stage(), params, FromMemory(line_data(), 3, 7), o, tmp_path, mesh=one_device())
    size = bytes_each(abstract_state({"line": params["line"]}, o, one_device()))
    # Beside it what is frozen, and examples.
    assert [round((bytes_then - before) / size, 2) for bytes_then in held] == [0, 1]


def live_bytes() -> int:
    """Of all arrays that are on devices."""
    gc.collect()
    return sum(x.nbytes for x in jax.live_arrays())


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    def run(params):
        fit(linear_stage(), params, FromMemory(line_data(), 3, 7), options(batch_size=3), tmp_path, mesh=one_device())

    run(LINE)
    other = {**LINE, "line": {"v": np.zeros((3, 1), np.float32), "w": np.zeros(3, np.float32)}}
    with pytest.raises(CheckpointError, match="choose another workdir"):
        run(other)


def test_only_the_last_checkpoints_are_kept(tmp_path):
    o = options(steps=6, batch_size=3, checkpoint_every=1, keep_checkpoints=2)
    fit(linear_stage(), LINE, FromMemory(line_data(), 3, 7), o, tmp_path, mesh=one_device())
    assert {p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()} == {"5", "6"}


@pytest.mark.parametrize("log_every", [1, 50])
def test_speed_counts_the_time_of_every_step_of_short_runs(tmp_path, log_every):
    """A step takes at least as long as its batch takes to prepare; the first one, which compiles, does not count."""
    seconds, steps = 0.1, 4

    def prepare(batch):
        time.sleep(seconds)
        return batch

    o = options(steps=steps, batch_size=3, log_every=log_every)
    batches = FromMemory(line_data(), 3, 7)
    fit(linear_stage()._replace(prepare=prepare), LINE, batches, o, tmp_path, mesh=one_device())
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rates = [line["images_per_second"] for line in lines if "images_per_second" in line]
    assert len(rates) == (steps - 1 if log_every == 1 else 1)
    assert all(0 < rate <= 3 / seconds for rate in rates)
