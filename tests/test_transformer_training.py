"""The transformer families learn: their loss against PyTorch's networks, and a LoRA by the command."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import jaxdiff
from jaxdiff.diffusion.schedules import at, noise_schedule
from jaxdiff.io.lora import init_lora, merge_lora, save_lora
from jaxdiff.training.options import NoiseOptions
from jaxdiff.training.precompute import encoder
from jaxdiff.training.stages import TOKENS, diffusion_stage, plain_network, random_noise, random_times
from jaxdiff.training.trainables import LORA_FILES
from tests.support.processes import ROOT

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("peft")
from tests.support import transformer_pipelines as oracle  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers' and ml_collections' own
TEXTS = ["a castle at night", ""]
GUIDANCE = 2.5


@pytest.fixture(scope="module", params=["flux", "sd3", "z_image", "flux2"])
def pair(request, tmp_path_factory):
    """(family, PyTorch's pipeline, the folder of its model)."""
    folder = tmp_path_factory.mktemp(request.param)
    pipe = oracle.pipeline(request.param, folder / "tokenizers")
    pipe.save_pretrained(folder / "model")
    return request.param, pipe, folder / "model"


def velocity(family, pipe, x, t, cond):
    """What PyTorch's transformer says of latents [B, h, w, C] at times [B], with the texts' states as we have them."""
    b, h, w, c = x.shape
    images, times = torch.tensor(x).permute(0, 3, 1, 2), torch.tensor(t)
    text = torch.tensor(np.asarray(cond.embeddings))
    pooled = None if cond.pooled is None else torch.tensor(np.asarray(cond.pooled))
    net = pipe.transformer
    with torch.no_grad():
        if family == "sd3":
            return net(images, text, pooled, times).sample.permute(0, 2, 3, 1).numpy()
        if family == "z_image":
            own = [rows[: int(n)] for rows, n in zip(text, np.asarray(cond.attention_mask).sum(1), strict=True)]
            out = net(list(images[:, :, None]), (1000 - times) / 1000, own, return_dict=False)[0]
            return -torch.stack(list(out)).squeeze(2).permute(0, 2, 3, 1).numpy()
        packed = oracle.diffusers.FluxPipeline._pack_latents(images, b, c, h, w)
        if family == "flux":
            ids = pipe._prepare_latent_image_ids(b, h // 2, w // 2, "cpu", torch.float32)
            told = torch.full((b,), GUIDANCE)
            out = net(packed, text, pooled, times / 1000, ids, torch.zeros(text.shape[1], 3), told).sample
        else:
            ids = pipe._prepare_latent_ids(torch.zeros(b, 4 * c, h // 2, w // 2))
            out = net(packed, text, times / 1000, ids, pipe._prepare_text_ids(text)).sample
        return oracle.diffusers.FluxPipeline._unpack_latents(out, 8 * h, 8 * w, 8).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("precomputed", [False, True])
def test_the_loss_is_pytorchs(pair, precomputed):
    """The mean square of velocity - (noise - latents), of logit-normal times."""
    family, pipe, folder = pair
    if precomputed and family not in ("flux", "z_image"):
        pytest.skip("as these two, of pooled texts and of masks")
    model, params = jaxdiff.load(folder)
    network = plain_network(model, GUIDANCE)
    stage = diffusion_stage(
        model, network=network, trainable=("transformer",), caption_dropout=0.0, times="logit_normal"
    )
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 24, 3)).astype(np.uint8)
    batch = stage.prepare({"image": images, "text": TEXTS})
    keys = jax.random.split(jax.random.key(0), 2)
    if precomputed:
        found = encoder(model, params, True, 2)([{"image": x, "text": t} for x, t in zip(images, TEXTS, strict=True)])
        batch = {name: jnp.asarray(x) for name, x in found.items()}
        assert batch["embeddings"].dtype == np.float16
    loss, _ = stage.loss(params, batch, keys)

    times_key, noise_key, _ = jnp.moveaxis(jax.vmap(lambda k: jax.random.split(k, 3))(keys), 1, 0)
    x0 = np.asarray(jaxdiff.encode(model, params, images))
    eps = np.asarray(random_noise(noise_key, x0.shape[1:]))
    t = random_times(model.scheduler, times_key, NoiseOptions(times="logit_normal"))
    time = at(noise_schedule(model.scheduler), t)
    alpha, sigma = (np.asarray(x)[:, None, None, None] for x in (time.alpha, time.sigma))
    cond = jaxdiff.encode_text(model, params, jaxdiff.tokenize(model, TEXTS))
    said = velocity(family, pipe, alpha * x0 + sigma * eps, np.array(t), cond)
    expected = ((said - (eps - x0)) ** 2).mean()
    np.testing.assert_allclose(loss, expected, rtol=2e-2 if precomputed else 1e-4)


def test_a_dropped_caption_is_the_empty_one(pair):
    family, _, folder = pair
    if family not in ("flux", "z_image"):
        pytest.skip("as these two, of pooled texts and of masks")
    model, params = jaxdiff.load(folder)
    images = np.zeros((2, 16, 16, 3), np.uint8)
    keys = jax.random.split(jax.random.key(0), 2)

    def loss(texts, dropout):
        stage = diffusion_stage(model, trainable=("transformer",), caption_dropout=dropout)
        return stage.loss(params, stage.prepare({"image": images, "text": texts}), keys)[0]

    np.testing.assert_allclose(loss(TEXTS, 1.0), loss(["", ""], 0.0), rtol=1e-6)
    assert abs(loss(TEXTS, 1.0) - loss(TEXTS, 0.0)) > 1e-6
    assert set(TOKENS) >= set(diffusion_stage(model).prepare({"image": images, "text": TEXTS})) - {"image"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for i in range(2):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3)).astype(np.uint8)).save(folder / f"{i}.png")
    lines = [json.dumps({"file_name": f"{i}.png", "text": "a castle at night"}) for i in range(2)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.mark.parametrize("kind", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_the_command_trains(pair, kind, data, tmp_path, train_cli):
    """Two updates; what is exported opens in PyTorch, and draws there what it draws here."""
    _, pipe, folder = pair
    code, _, err = train_cli(
        f"--config={ROOT}/configs/finetune/{kind}.py", f"--workdir={tmp_path / 'run'}", f"--config.data.path={data}",
        f"--config.init_from.model={folder}", "--config.data.threads=1", "--config.data.image_size=16",
        "--config.steps=2", "--config.batch_size=2", "--config.accumulate=1", "--config.warmup_steps=0",
        "--config.learning_rate=0.05", "--config.schedule=constant", "--config.ema_decay=0.0", "--config.eval.images=0",
        "--config.dtype=float32", "--config.remat=full", "--config.log_every=1", "--config.lr_multipliers=()",
    )  # fmt: skip
    assert code == 0, err
    export, noise = tmp_path / "run" / "export", np.random.default_rng(0).normal(size=(2, 8, 8, oracle.CHANNELS))
    model, params = jaxdiff.load(folder)
    if kind == "full":
        changed = jaxdiff.load(export)[1]
        again = type(pipe).from_pretrained(export)
        again.set_progress_bar_config(disable=True)
        expected = oracle.draw(again, TEXTS, noise.astype(np.float32), 2, 2.0)
    else:
        changed = jaxdiff.load_lora(model, params, export / LORA_FILES["diffusers"])
        other = jaxdiff.load_lora(model, params, export / LORA_FILES["kohya"])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), changed, other)
        pipe.load_lora_weights(export / LORA_FILES["diffusers"])
        expected = oracle.draw(pipe, TEXTS, noise.astype(np.float32), 2, 2.0)
        pipe.unload_lora_weights()
    found = jaxdiff.generate(model, changed, TEXTS, steps=2, guidance_scale=2.0, noise=noise)
    assert np.abs(found - 255 * expected).max() <= 3
    assert (
        np.abs(
            found.astype(int) - jaxdiff.generate(model, params, TEXTS, steps=2, guidance_scale=2.0, noise=noise)
        ).max()
        > 3
    )


def test_pytorch_opens_flux_loras_in_kohyas_names(pair, tmp_path):
    """Of double blocks: for the fused layer of single ones, PyTorch knows FLUX.1's own width only."""
    family, pipe, folder = pair
    if family != "flux":
        pytest.skip("kohya's names are FLUX.1's")
    model, params = jaxdiff.load(folder)
    chosen = {"targets": ("transformer",), "endings": ("add_q_proj", "to_add_out", "ff.net.0.proj")}
    fresh = init_lora(model, params, 2, 3.0, key=jax.random.key(0), **chosen)
    ups = np.random.default_rng(0)
    lora = {
        name: dataclasses.replace(f, up=jnp.asarray(ups.normal(size=f.up.shape), jnp.float32))
        for name, f in fresh.items()
    }
    save_lora(tmp_path / "kohya.safetensors", model, lora, "kohya")
    noise = np.random.default_rng(0).normal(size=(2, 8, 8, oracle.CHANNELS)).astype(np.float32)
    pipe.load_lora_weights(tmp_path / "kohya.safetensors")
    expected = oracle.draw(pipe, TEXTS, noise, 2, 2.0)
    pipe.unload_lora_weights()
    changed = jaxdiff.load_lora(model, params, tmp_path / "kohya.safetensors")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), changed, merge_lora(params, lora))
    found = jaxdiff.generate(model, changed, TEXTS, steps=2, guidance_scale=2.0, noise=noise)
    assert np.abs(found - 255 * expected).max() <= 3


def test_stages_of_unets_are_refused(pair, data, tmp_path, train_cli):
    _, _, folder = pair
    code, _, err = train_cli(
        f"--config={ROOT}/configs/finetune/controlnet.py", f"--workdir={tmp_path / 'run'}",
        f"--config.data.path={data}", f"--config.init_from.model={folder}", "--config.data.image_size=16",
    )  # fmt: skip
    assert code == 2
    assert "stage 'controlnet' is for models with a UNet" in err
