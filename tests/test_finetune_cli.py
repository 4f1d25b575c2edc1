"""Every config of configs/finetune from the command line: trained, evaluated, and its export drawn by diffusers."""

import json
import sys

import jax
import numpy as np
import pytest
from PIL import Image

import jaxdiff
from jaxdiff.cli import sample
from jaxdiff.diffusion.sampling_loop import step_keys
from jaxdiff.io.controlnet import load_controlnet
from jaxdiff.io.images import read_image
from jaxdiff.models.model import with_controlnets
from jaxdiff.sampling.noise import image_keys, initial_noise
from jaxdiff.training.trainables import EMBEDDING_FILE, LORA_FILES
from tests.support.processes import ROOT
from tests.support.stages import random_images
from tests.support.tiny import LATENT, SIDE

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")

from diffusers.pipelines.stable_diffusion import (  # noqa: E402
    pipeline_stable_diffusion_inpaint,
    pipeline_stable_diffusion_upscale,
)
from diffusers.schedulers import scheduling_lcm  # noqa: E402

from jaxdiff.sampling.inputs import upscaler_noise  # noqa: E402
from tests.support import oracle, pipelines  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers' and ml_collections' own
STEPS, SCALE, LEVELS = 2, 7.5, 2  # LEVELS: see tests/test_tasks.py
FEW = ("lcm", "lcm_lora")  # drawn by LCM's scheduler
WHOLE = ("full", "dreambooth", "inpainting", "upscaler", "lcm")  # whose export is a model
PROMPT = {"textual_inversion": "a <cat>"}
RATE = {"textual_inversion": 0.3, "lora": 0.1, "lcm_lora": 0.1, "controlnet": 0.05}
MORE = {
    "lora": ["--config.trainable=('unet', 'text_encoder')", "--config.lr_multipliers=(('lora/text_encoder', 0.0),)"],
    "dreambooth": [
        "--config.data.captions=('a photo of sks castle',)",
        "--config.prior_preservation.captions=('a castle',)",
    ],
    "textual_inversion": [
        "--config.textual_inversion.token=<cat>",
        "--config.textual_inversion.initial=castle",
        "--config.data.captions=('a {}',)",  # the tiny model reads 12 tokens
    ],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three images to learn and two set aside."""
    folder = tmp_path_factory.mktemp("data")
    for split, count in (("train", 3), ("validation", 2)):
        (folder / split).mkdir()
        for i, image in enumerate(random_images(count, seed=count)):
            Image.fromarray(image).save(folder / split / f"{i}.png")
        lines = [json.dumps({"file_name": f"{i}.png", "text": "a house"}) for i in range(count)]
        (folder / split / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def command(kind, data, tiny_folder, workdir):
    """The config's own command, for two updates of a tiny model on a CPU."""
    return [
        f"--config={ROOT}/configs/finetune/{kind}.py", f"--workdir={workdir}", f"--config.data.path={data}",
        f"--config.init_from.model={tiny_folder}", "--config.data.eval_split=validation", "--config.data.threads=1",
        f"--config.eval.prompts=('{PROMPT.get(kind, 'a castle')}',)", f"--config.eval.steps={STEPS}",
        f"--config.eval.scheduler={'lcm' if kind in FEW else 'ddim'}", f"--config.eval.guidance_scale={SCALE}",
        "--config.eval.images=2",
        "--config.steps=2", "--config.batch_size=2", "--config.accumulate=1", "--config.warmup_steps=0",
        f"--config.learning_rate={RATE.get(kind, 1e-2)}", "--config.schedule=constant", "--config.ema_decay=0.0",
        "--config.dtype=float32", "--config.remat=", "--config.eval_every=2", "--config.log_every=1",
        *MORE.get(kind, []),
    ]  # fmt: skip


def sheet(workdir, step, given):
    """The drawing of a sheet, and for what needs more than a prompt what it was given and the image itself."""
    image = read_image(workdir / "samples" / f"step-{step:06d}.png")
    row = [image[:, x : x + SIDE] for x in range(0, image.shape[1], SIDE + 2)]
    assert len(row) == (3 if given else 1)
    return (row[1], row[0], row[2]) if given else (row[0], None, None)


def opened(kind, base, export):
    """The model of an export, alone or on what it was trained from."""
    if kind in WHOLE:
        return jaxdiff.load(export)
    model, params = jaxdiff.load(base)
    if kind in ("lora", "lcm_lora"):
        changed = jaxdiff.load_lora(model, params, export / LORA_FILES["kohya"])
        jax.tree.map(np.testing.assert_array_equal, changed["text_encoder"], params["text_encoder"])  # its rate is 0
        return model, changed
    if kind == "textual_inversion":
        return jaxdiff.load_textual_inversion(model, params, export / EMBEDDING_FILE)
    return with_controlnets(model, params, load_controlnet(export))


def torch_pipeline(kind, base, export):
    if kind in WHOLE:
        return diffusers.DiffusionPipeline.from_pretrained(export)
    if kind == "controlnet":
        net = diffusers.ControlNetModel.from_pretrained(export)
        return diffusers.StableDiffusionControlNetPipeline.from_pretrained(base, controlnet=net)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(base)
    if kind in ("lora", "lcm_lora"):
        pipe.load_lora_weights(str(export), weight_name=LORA_FILES["diffusers"])
        if kind == "lcm_lora":
            pipe.scheduler = diffusers.LCMScheduler.from_config(pipe.scheduler.config)
    else:
        pipe.load_textual_inversion(str(export), weight_name=EMBEDDING_FILE)
    return pipe


# In long runs alone: what these have of their own is also tested in test_finetune.py.
LONG = ("full", "dreambooth", "inpainting", "controlnet", "upscaler", "textual_inversion", *FEW)
KINDS = sorted(path.stem for path in (ROOT / "configs" / "finetune").glob("*.py"))


@pytest.mark.parametrize("kind", [pytest.param(k, marks=pytest.mark.slow if k in LONG else ()) for k in KINDS])
def test_it_learns_and_diffusers_draws_what_its_last_sheet_shows(
    kind,
    train_cli,
    data,
    tiny_folder,
    tmp_path,
    monkeypatch,
):
    run = command(kind, data, tiny_folder, tmp_path)
    if kind == "lora":  # beside images of a class, and stopped on the way
        run.append(f"--config.prior_preservation.path={data}")
        code, _, err = train_cli(*run, "--config.steps=1")
        assert code == 0, err
    if kind == "dreambooth":  # beside images of the class that the model draws itself
        flags = [f"--model={tiny_folder}", "--prompt=a castle", f"--steps={STEPS}", f"--guidance_scale={SCALE}"]
        argv = ["sample.py", *flags, "--scheduler=ddim", f"--output={tmp_path}/class/castle.png"]
        monkeypatch.setattr(sys, "argv", argv)
        (tmp_path / "class").mkdir()
        assert sample.main(argv) == 0
        run.append(f"--config.prior_preservation.path={tmp_path}/class")
    code, out, err = train_cli(*run)
    assert code == 0, err
    assert ("goes on from step 1" in out) == (kind == "lora")

    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    before, *_, after = [line for line in lines if "eval_loss" in line]
    assert (before["step"], after["step"]) == (0, 2)
    assert sum(name.startswith("eval_loss_t") for name in after) == 10
    assert before["eval_loss"] != after["eval_loss"]

    needs_more = kind in ("controlnet", "inpainting", "upscaler")
    first, given, original = sheet(tmp_path, 0, needs_more)
    drawn, _, _ = sheet(tmp_path, 2, needs_more)
    assert np.abs(drawn.astype(int) - first).max() > 2 * LEVELS
    ours, theirs = {}, {"latents": oracle.nchw(np.asarray(initial_noise(image_keys(0, 1), LATENT)))}
    middle = np.zeros((SIDE, SIDE), bool)
    middle[SIDE // 4 : -SIDE // 4, SIDE // 4 : -SIDE // 4] = True
    if kind == "controlnet":
        ours, theirs["image"] = {"control_images": [given]}, oracle.nchw(given[None] / np.float32(255))
    elif kind == "inpainting":
        np.testing.assert_array_equal(given, np.where(middle[..., None], np.uint8(127), original))
        ours = {"image": original, "mask": middle}
        pipelines.inject(monkeypatch, pipeline_stable_diffusion_inpaint, oracle.nhwc(theirs.pop("latents")))
        theirs |= {"image": original[None] / 255.0, "mask_image": middle[None, ..., None] / 1.0, "strength": 1.0}
    elif kind == "upscaler":
        small = given[::2, ::2]
        ours = {"image": small, "noise_level": 20}
        noise = upscaler_noise(image_keys(0, 1), (SIDE // 2, SIDE // 2, 3))
        pipelines.inject(monkeypatch, pipeline_stable_diffusion_upscale, noise)
        theirs |= {"image": small[None] / 255.0, "noise_level": 20}
    prompt, options = PROMPT.get(kind, "a castle"), {"guidance_scale": SCALE}
    loaded = opened(kind, tiny_folder, tmp_path / "export")
    scheduler = "lcm" if kind in FEW else "ddim"
    if kind in FEW:  # the noise of each step is that of our keys
        noises = [jax.random.normal(step_keys(image_keys(0, 1), i)[0], LATENT)[None] for i in range(STEPS)]
        pipelines.inject(monkeypatch, scheduling_lcm, *noises)
    again = jaxdiff.generate(*loaded, prompt, **options, **ours, steps=STEPS, scheduler=scheduler)[0]
    assert np.abs(again.astype(int) - drawn).max() <= 1  # a LoRA's file holds rounded products
    pipe = torch_pipeline(kind, tiny_folder, tmp_path / "export")
    pipe.check_inputs = lambda *args, **kwargs: None  # it wants multiples of 8 whatever the autoencoder's factor
    pipe.set_progress_bar_config(disable=True)
    if kind in ("full", "dreambooth", "lora", "textual_inversion", "inpainting", *FEW):
        theirs |= {"height": SIDE, "width": SIDE}
    theirs = pipe(prompt, **options, **theirs, num_inference_steps=STEPS, output_type="np").images[0]
    assert np.abs(drawn / 255.0 - theirs).max() <= LEVELS / 255


def test_what_needs_images_takes_no_latents(train_cli, data, tiny_folder, tmp_path):
    run = command("controlnet", data, tiny_folder, tmp_path)
    code, _, err = train_cli(*run, "--config.cache_latents=1")
    assert code == 2
    assert "cache_latents 1" in err
