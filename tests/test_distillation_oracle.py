"""Latent consistency distillation against PyTorch diffusers: the loss of a batch, written out with its networks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdiff
from jaxdiff.training.options import NoiseOptions
from jaxdiff.training.stages import fold_in_each, per_example, random_noise, random_times
from jaxdiff.training.train_step import STATE
from jaxdiff.training.trainables import make
from tests.support.stages import settings

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from tests.support import oracle, pipelines  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers' own
TEXTS = ["a castle", "a red dragon", "blurry"]
SKIP, HUBER, LOW, HIGH, DIM = 20, 1e-3, 3.0, 15.0, 16


def shaken(tree, seed):
    """Parameters moved at random, so that student, average and teacher differ and nothing is zero."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: np.asarray(x) + 0.02 * rng.standard_normal(np.shape(x), np.float32), tree)


def torch_unet(folder, target, params, unet):
    target.export(folder, {**params, "unet": unet})
    return diffusers.UNet2DConditionModel.from_pretrained(folder, subfolder="unet")


def conditions(pipe, batch, side):
    """What the networks are told of the captions and of none."""
    ids = torch.from_numpy(np.asarray(batch["tokens"])).long()
    empty = torch.from_numpy(np.asarray(jaxdiff_empty(pipe))).long().expand(len(ids), -1)
    if "tokens_2" not in batch:
        return [(pipe.text_encoder(x)[0], None) for x in (ids, empty)]
    ids_2 = torch.from_numpy(np.asarray(batch["tokens_2"])).long()
    first = pipe.text_encoder(ids, output_hidden_states=True)
    second = pipe.text_encoder_2(ids_2, output_hidden_states=True)
    states = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1)
    time_ids = torch.tensor([[side, side, 0.0, 0.0, side, side]]).repeat(len(ids), 1)
    added = {"text_embeds": second[0], "time_ids": time_ids}
    none = {"text_embeds": torch.zeros_like(second[0]), "time_ids": time_ids}  # XL's own, force_zeros_for_empty_prompt
    return [(states, added), (torch.zeros_like(states), none)]


def jaxdiff_empty(pipe):
    return pipe.tokenizer([""], padding="max_length", max_length=pipe.tokenizer.model_max_length).input_ids


@torch.no_grad()
def theirs(pipe, student, average, batch, x0, eps, t, scale, kind):
    """Luo et al. 2023, algorithm 1, by diffusers' networks and its tables of the noise; nchw tensors."""
    scheduler = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
    bars = scheduler.alphas_cumprod

    def levels(t):
        return bars[t].sqrt()[:, None, None, None], (1 - bars[t]).sqrt()[:, None, None, None]

    def split(output, x, t):
        """The clean latents and the noise that a prediction implies."""
        alpha, sigma = levels(t)
        if kind == "epsilon":
            return (x - sigma * output) / alpha, output
        if kind == "v_prediction":
            return alpha * x - sigma * output, alpha * output + sigma * x
        return output, (x - alpha * output) / sigma

    def f(net, x, t):
        states, added = with_text
        told = diffusers.LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, scale - 1, embedding_dim=DIM)
        clean = split(net(x, t, states, timestep_cond=told, added_cond_kwargs=added).sample, x, t)[0]
        scaled = 10.0 * t.float()[:, None, None, None]
        return 0.25 / (scaled**2 + 0.25) * x + scaled / (scaled**2 + 0.25).sqrt() * clean

    with_text, without = conditions(pipe, batch, 2.0 * x0.shape[-1])
    x = scheduler.add_noise(x0, eps, t)
    predictions = [split(pipe.unet(x, t, s, added_cond_kwargs=a).sample, x, t) for s, a in (with_text, without)]
    w = (scale - 1)[:, None, None, None]
    clean, noise = (cond + w * (cond - uncond) for cond, uncond in zip(*predictions, strict=True))
    below = (t - SKIP).clamp(min=0)
    alpha, sigma = levels(below)
    target = f(average, alpha * clean + sigma * noise, below)
    return (((f(student, x, t) - target) ** 2 + HUBER**2).sqrt() - HUBER).mean().item()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sd1", "v_prediction"),
        pytest.param("sd1", "sample", marks=pytest.mark.slow),
        pytest.param("sdxl", "epsilon", marks=pytest.mark.slow),
    ],
)
def test_the_loss_of_consistency_distillation_equals_pytorchs(name, kind, tmp_path):
    pipe = pipelines.pipeline(name, tmp_path / "parts", kind)
    pipe.save_pretrained(tmp_path / "model")
    model, params = jaxdiff.load(tmp_path / "model")
    scales = {"guidance_min": LOW, "guidance_max": HIGH, "guidance_dim": DIM}
    target = make(settings("lcm", distillation=scales), model, params)
    assert target.params["unet"]["time_embedding"]["cond_proj"]["kernel"].shape[0] == DIM
    unet, average = (shaken(target.params["unet"], seed) for seed in (0, 1))
    rng, keys = np.random.default_rng(0), jax.random.split(jax.random.key(0), len(TEXTS))
    batch = target.stage.prepare({"text": TEXTS, "image": np.zeros((3, 1), np.uint8)})
    batch = {n: x for n, x in batch.items() if n != "image"} | {
        "latents": rng.standard_normal((3, 8, 8, 4), np.float32)
    }
    state = {"step": jnp.int32(0), "ema": {"unet": average}}
    value, _ = jax.jit(target.stage.loss)({**target.params, "unet": unet, STATE: state}, batch, keys)

    time_keys, noise_keys, _ = jnp.moveaxis(jax.vmap(lambda k: jax.random.split(k, 3))(keys), 1, 0)
    drawn = np.asarray(random_times(model.scheduler, time_keys, NoiseOptions()))
    t = torch.from_numpy((drawn // SKIP + 1).astype(np.int64) * SKIP - 1)  # of 50 steps of the solver
    eps = random_noise(noise_keys, (8, 8, 4))
    share = np.asarray(per_example(jax.random.uniform, fold_in_each(keys, 2), ()))
    scale = torch.from_numpy(LOW + (HIGH - LOW) * share)
    nets = [torch_unet(tmp_path / f"net{i}", target, target.params, u) for i, u in enumerate((unet, average))]
    expected = theirs(pipe, *nets, batch, oracle.nchw(batch["latents"]), oracle.nchw(eps), t, scale, kind)
    np.testing.assert_allclose(value, expected, rtol=2e-5)


def test_what_is_saved_has_the_class_and_scheduler_that_pytorch_opens(tmp_path):
    """Told of the guidance it is LCM's own pipeline; with the guidance built in, which that one cannot, a plain one."""
    pipelines.pipeline("sd1", tmp_path / "parts", "v_prediction").save_pretrained(tmp_path / "model")
    model, params = jaxdiff.load(tmp_path / "model")
    for dim, cls in ((DIM, "LatentConsistencyModelPipeline"), (0, "StableDiffusionPipeline")):
        target = make(settings("lcm", distillation={"guidance_dim": dim}), model, params)
        target.export(tmp_path / cls, target.params)
        pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / cls)
        assert type(pipe).__name__ == cls
        assert type(pipe.scheduler) is diffusers.LCMScheduler
        assert pipe.scheduler.config.prediction_type == "v_prediction"
        np.testing.assert_allclose(
            pipe.scheduler.alphas_cumprod,
            diffusers.DDPMScheduler.from_pretrained(tmp_path / "model", subfolder="scheduler").alphas_cumprod,
        )
        opened = jaxdiff.load(tmp_path / cls)[0]
        assert opened.scheduler == target.model.scheduler
        assert opened.options.guidance_scale == (7.5 if dim else 1.0)
        assert opened.options.steps == 4
        assert dataclasses.replace(opened.unet.config, time_cond_proj_dim=None) == model.unet.config
