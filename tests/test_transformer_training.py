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
from jaxdiff.models.model import example_inputs, param_shapes
from jaxdiff.training.defaults import base
from jaxdiff.training.options import NoiseOptions, OptionsError
from jaxdiff.training.precompute import encoder
from jaxdiff.training.stages import TOKENS, diffusion_stage, plain_network, random_noise, random_times
from jaxdiff.training.trainables import LORA_FILES, UNET_STAGES, make
from tests.support.processes import ROOT

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("peft")
from tests.support import transformer_pipelines as oracle  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers' and ml_collections' own
TEXTS = ["a castle at night", ""]
GUIDANCE = 2.5


FAMILIES = ("flux", "sd3", "z_image", "flux2")
SIZE = (8, 12)  # of latents that are drawn, as elsewhere, so that no other program is compiled


@pytest.fixture
def pair(request, made_transformers):
    """(family, PyTorch's pipeline, the folder of its model)."""
    return request.param, *made_transformers.pipe(request.param)


def of(*families):
    return pytest.mark.parametrize("pair", families, indirect=True)


def without_images(batch, latents):
    return {name: x for name, x in batch.items() if name != "image"} | {"latents": latents}


# Precomputed texts are pooled ones as well, or have a mask, as of these two.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("pair", "precomputed"),
    [*((family, False) for family in FAMILIES), ("flux", True), ("z_image", True)],
    indirect=["pair"],
)
def test_the_loss_is_pytorchs(pair, precomputed, made_transformers):
    """The mean square of velocity - (noise - latents), of logit-normal times."""
    family, pipe, _ = pair
    model, params = made_transformers.model(family)
    network = plain_network(model, GUIDANCE)
    stage = diffusion_stage(
        model, network=network, trainable=("transformer",), caption_dropout=0.0, times="logit_normal"
    )
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 24, 3)).astype(np.uint8)
    batch = stage.prepare({"image": images, "text": TEXTS})
    keys, tokens = jax.random.split(jax.random.key(0), 2), jaxdiff.tokenize(model, TEXTS)
    x0, cond = jax.jit(lambda p: (jaxdiff.encode(model, p, images), jaxdiff.encode_text(model, p, tokens)))(params)
    if precomputed:
        found = encoder(model, params, True, 2)([{"image": x, "text": t} for x, t in zip(images, TEXTS, strict=True)])
        batch = {name: jnp.asarray(x) for name, x in found.items()}
        assert batch["embeddings"].dtype == np.float16
    elif family != "flux":  # images are encoded alike
        batch = without_images(batch, x0)
    loss, _ = jax.jit(stage.loss)(params, batch, keys)

    times_key, noise_key, _ = jnp.moveaxis(jax.vmap(lambda k: jax.random.split(k, 3))(keys), 1, 0)
    x0 = np.asarray(x0)
    eps = np.asarray(random_noise(noise_key, x0.shape[1:]))
    t = random_times(model.scheduler, times_key, NoiseOptions(times="logit_normal"))
    time = at(noise_schedule(model.scheduler), t)
    alpha, sigma = (np.asarray(x)[:, None, None, None] for x in (time.alpha, time.sigma))
    lengths = None if cond.attention_mask is None else np.asarray(cond.attention_mask).sum(1)
    texts = [None if states is None else np.array(states) for states in (cond.embeddings, cond.pooled)]
    told = np.full(2, GUIDANCE, np.float32) if family == "flux" else None
    said = oracle.velocity(
        family, pipe.transformer, np.array(alpha * x0 + sigma * eps), np.array(t), *texts, told, lengths
    )
    expected = ((said - (eps - x0)) ** 2).mean()
    np.testing.assert_allclose(loss, expected, rtol=2e-2 if precomputed else 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["flux", "z_image"])  # of pooled texts and of masks
def test_a_dropped_caption_is_the_empty_one(family, made_transformers):
    model, params = made_transformers.model(family)
    images, latents = np.zeros((2, 16, 16, 3), np.uint8), np.zeros((2, 8, 8, oracle.CHANNELS), np.float32)
    keys = jax.random.split(jax.random.key(0), 2)

    stages = {x: diffusion_stage(model, trainable=("transformer",), caption_dropout=x) for x in (0.0, 1.0)}
    losses = {x: jax.jit(stage.loss) for x, stage in stages.items()}

    def loss(texts, dropout):
        batch = stages[dropout].prepare({"image": images, "text": texts})
        return losses[dropout](params, without_images(batch, latents), keys)[0]

    np.testing.assert_allclose(loss(TEXTS, 1.0), loss(["", ""], 0.0), rtol=1e-5)
    assert abs(loss(TEXTS, 1.0) - loss(TEXTS, 0.0)) > 1e-6
    assert set(TOKENS) >= set(diffusion_stage(model).prepare({"image": images, "text": TEXTS})) - {"image"}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_block_can_be_computed_again(family, made_transformers):
    model, _ = made_transformers.model(family)
    config, inputs = model.transformer.config, example_inputs(model)["transformer"]
    counts = ("num_layers", "num_single_layers", "n_layers", "n_refiner_layers", "n_refiner_layers")
    blocks = sum(getattr(config, name, 0) for name in counts)
    for remat, expected in (("full", blocks), ("", 0)):
        net = model.transformer.copy(remat=remat)
        program = jax.make_jaxpr(lambda p, *x, net=net: net.apply({"params": p}, *x))(
            param_shapes(model)["transformer"], *inputs
        )
        assert sum("prevent_cse" in equation.params for equation in program.eqns) == expected


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for i in range(2):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3)).astype(np.uint8)).save(folder / f"{i}.png")
    lines = [json.dumps({"file_name": f"{i}.png", "text": "a castle at night"}) for i in range(2)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@of(FAMILIES[0], *(pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES[1:]))
@pytest.mark.parametrize("kind", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_the_command_trains(pair, kind, data, tmp_path, train_cli, made_transformers):
    """Two updates; what is exported opens in PyTorch, and draws there what it draws here."""
    family, pipe, folder = pair
    remat = "full" if family == "sd3" else ""
    code, _, err = train_cli(
        f"--config={ROOT}/configs/finetune/{kind}.py", f"--workdir={tmp_path / 'run'}", f"--config.data.path={data}",
        f"--config.init_from.model={folder}", "--config.data.threads=1", "--config.data.image_size=16",
        "--config.steps=2", "--config.batch_size=2", "--config.accumulate=1", "--config.warmup_steps=0",
        "--config.learning_rate=0.05", "--config.schedule=constant", "--config.ema_decay=0.0", "--config.eval.images=0",
        "--config.dtype=float32", f"--config.remat={remat}", "--config.log_every=1", "--config.lr_multipliers=()",
    )  # fmt: skip
    assert code == 0, err
    export, noise = tmp_path / "run" / "export", np.random.default_rng(0).normal(size=(2, *SIZE, oracle.CHANNELS))
    model, params = made_transformers.model(family)
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


def test_pytorch_opens_flux_loras_in_kohyas_names(made_transformers, tmp_path):
    """Of double blocks: for the fused layer of single ones, PyTorch knows FLUX.1's own width only."""
    pipe, (model, params) = made_transformers.pipe("flux")[0], made_transformers.model("flux")
    chosen = {"targets": ("transformer",), "endings": ("add_q_proj", "to_add_out", "ff.net.0.proj")}
    fresh = init_lora(model, params, 2, 3.0, key=jax.random.key(0), **chosen)
    ups = np.random.default_rng(0)
    lora = {
        name: dataclasses.replace(f, up=jnp.asarray(ups.normal(size=f.up.shape), jnp.float32))
        for name, f in fresh.items()
    }
    save_lora(tmp_path / "kohya.safetensors", model, lora, "kohya")
    noise = np.random.default_rng(0).normal(size=(2, *SIZE, oracle.CHANNELS)).astype(np.float32)
    pipe.load_lora_weights(tmp_path / "kohya.safetensors")
    expected = oracle.draw(pipe, TEXTS, noise, 2, 2.0)
    pipe.unload_lora_weights()
    changed = jaxdiff.load_lora(model, params, tmp_path / "kohya.safetensors")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), changed, merge_lora(params, lora))
    found = jaxdiff.generate(model, changed, TEXTS, steps=2, guidance_scale=2.0, noise=noise)
    assert np.abs(found - 255 * expected).max() <= 3


@pytest.mark.parametrize("family", FAMILIES)
def test_stages_of_unets_are_refused(family, made_transformers):
    for stage in UNET_STAGES:
        config = base()
        config.stage = stage
        with pytest.raises(OptionsError, match=f"stage '{stage}' is for models with a UNet, which init_from.model lac"):
            make(config, made_transformers.model(family)[0], {})


def test_the_command_refuses_stages_of_unets(made_transformers, data, tmp_path, train_cli):
    folder = made_transformers.pipe("flux")[1]
    code, _, err = train_cli(
        f"--config={ROOT}/configs/finetune/controlnet.py", f"--workdir={tmp_path / 'run'}",
        f"--config.data.path={data}", f"--config.init_from.model={folder}", "--config.data.image_size=16",
    )  # fmt: skip
    assert code == 2
    assert "stage 'controlnet' is for models with a UNet" in err
