"""The stage that sharpens a decoder: against PyTorch, and as a run of train.py."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdiff
from jaxdiff.diffusion.schedules import at, noise_schedule
from jaxdiff.errors import WeightsError
from jaxdiff.io.discriminator import load_patches
from jaxdiff.io.tensor_files import named_tensors, write_tensors
from jaxdiff.models.discriminator import PatchDiscriminator
from jaxdiff.models.model import apply
from jaxdiff.training.checks import check_settings
from jaxdiff.training.options import OptionsError, RedrawOptions
from jaxdiff.training.run import build_run
from jaxdiff.training.stages import fold_in_each, per_example, prepare_pairs
from jaxdiff.training.train_step import STATE
from jaxdiff.training.trainables import make
from jaxdiff.training.vae_decoder import (
    feature_distance,
    merge_decoder,
    redraw_latents,
    split_decoder,
    vae_decoder_stage,
)
from tests.support.stages import BATCH, keys, random_images, settings, whole_model, write_houses
from tests.support.tiny import SIDE, tiny_params

TINY = {"adversary": {"features": 4, "layers": 2}}


def fresh(discriminator: PatchDiscriminator, seed: int = 0):
    return discriminator.init(jax.random.key(seed), jnp.zeros((1, SIDE, SIDE, 3)))["params"]


# --- against PyTorch


def theirs(features: int, layers: int):
    """taming-transformers' NLayerDiscriminator with batch normalisation, as a list of layers."""
    from torch import nn

    found = [nn.Conv2d(3, features, 4, 2, 1), nn.LeakyReLU(0.2, True)]
    width = features
    for i in range(1, layers + 1):
        wider, stride = features * min(2**i, 8), 2 if i < layers else 1
        found += [nn.Conv2d(width, wider, 4, stride, 1, bias=False), nn.BatchNorm2d(wider), nn.LeakyReLU(0.2, True)]
        width = wider
    net = nn.Module()
    net.main = nn.Sequential(*found, nn.Conv2d(width, 1, 4, 1, 1))
    return net


@pytest.mark.slow
@pytest.mark.parametrize("where", ["alone", "checkpoint"])
def test_weights_of_taming_transformers_are_read(where, tmp_path):
    torch = pytest.importorskip("torch")
    net = theirs(4, 3)
    net.main[3].running_mean += 1  # what training does not read
    prefix = "loss.discriminator." if where == "checkpoint" else ""
    tensors = {prefix + name: x.numpy() for name, x in net.state_dict().items()}
    more = {"encoder.conv_in.weight": np.zeros((1, 1), np.float32)} if prefix else {}
    write_tensors(tmp_path / "d.safetensors", {**tensors, **more})
    ours = PatchDiscriminator(4, 3)
    params = load_patches(tmp_path / "d.safetensors", fresh(ours))
    x = np.random.default_rng(0).uniform(-1, 1, (2, 32, 32, 3)).astype(np.float32)
    with torch.no_grad():
        expected = net.main(torch.from_numpy(x.transpose(0, 3, 1, 2))).permute(0, 2, 3, 1)
    np.testing.assert_allclose(ours.apply({"params": params}, x), expected, atol=2e-5)
    with pytest.raises(WeightsError, match="main"):
        load_patches(tmp_path / "d.safetensors", fresh(PatchDiscriminator(4, 2)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # diffusers' own
def test_losses_gradients_and_the_adaptive_weight_equal_pytorchs():
    """Of the decoder by both losses, of the discriminator by its own, at their first step."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    functional = torch.nn.functional
    model, discriminator = whole_model(), PatchDiscriminator(4, 2)
    params = split_decoder(tiny_params(model)) | {"discriminator": fresh(discriminator)}
    stage = vae_decoder_stage(model, discriminator, weight=0.8, edge_weight=0.0)
    images = np.random.default_rng(0).integers(0, 256, (BATCH, SIDE, SIDE, 3)).astype(np.uint8)
    batch, state = {"image": images}, {STATE: {"step": jnp.int32(0)}}
    trained = {name: params[name] for name in stage.trainable}
    (total, metrics), grads = jax.jit(
        jax.value_and_grad(lambda trained: stage.loss({**params, **state, **trained}, batch, keys()), has_aux=True)
    )(trained)

    vae = diffusers.AutoencoderKL.from_config(model.vae.config.to_dict())
    vae.load_state_dict({name: torch.from_numpy(x) for name, x in named_tensors(merge_decoder(params)["vae"])})
    net = theirs(4, 2)
    net.load_state_dict({n: torch.from_numpy(x) for n, x in named_tensors(params["discriminator"])}, strict=False)
    x = torch.from_numpy(images.transpose(0, 3, 1, 2).astype(np.float32)) / 127.5 - 1
    mean, logvar = apply(model, params, "vae", images / np.float32(127.5) - 1, method="encode")
    z = mean + jnp.exp(0.5 * logvar) * per_example(jax.random.normal, keys(), mean.shape[1:])
    y = vae.decode(torch.from_numpy(np.array(z).transpose(0, 3, 1, 2))).sample
    # Pixels at three sizes, the edges having no weight.
    sizes = [(functional.avg_pool2d(y, n) - functional.avg_pool2d(x, n)).abs().mean() for n in (1, 2, 4)]
    reconstruction = sum(sizes) / 3
    generator = -net.main(y).mean()
    last = vae.decoder.conv_out.weight
    norms = [torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (reconstruction, generator)]
    weight = 0.8 * torch.clamp(norms[0] / (norms[1] + 1e-4), 0.0, 1e4).detach()
    (reconstruction + weight * generator).backward()
    decoder = {
        n: p.grad.numpy() for n, p in vae.named_parameters() if n.split(".")[0] in ("decoder", "post_quant_conv")
    }
    net.zero_grad()
    hinge = (functional.relu(1 - net.main(x)).mean() + functional.relu(1 + net.main(y.detach())).mean()) / 2
    hinge.backward()

    for name, expected in (("reconstruction", reconstruction), ("generator", generator), ("discriminator", hinge)):
        np.testing.assert_allclose(metrics[name], expected.item(), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(metrics["weight"], weight.item(), rtol=1e-3)
    np.testing.assert_allclose(total, (reconstruction + weight * generator + hinge).item(), rtol=1e-4)
    for ours, expected in (
        (grads["vae_decoder"], decoder),
        (grads["discriminator"], {n: p.grad.numpy() for n, p in net.named_parameters()}),
    ):
        found = dict(named_tensors(ours))
        assert found.keys() == expected.keys()
        # A bias before a batch norm that follows has no gradient but rounding, hence the absolute tolerance.
        most = max(np.abs(g).max() for g in expected.values())
        for name in expected:
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-3, atol=1e-4 * most, err_msg=name)


# --- the stage


@pytest.mark.slow
def test_the_decoder_does_not_hear_the_discriminator_before_the_start():
    model, discriminator = whole_model(), PatchDiscriminator(4, 2)
    params = split_decoder(tiny_params(model)) | {"discriminator": fresh(discriminator)}
    batch = {"image": random_images(BATCH)}

    losses = [vae_decoder_stage(model, discriminator, **how).loss for how in ({"start": 3}, {"weight": 0.0})]

    @jax.jit
    def grads(step, params):
        state = {STATE: {"step": step}}
        return [jax.grad(lambda p, loss=loss: loss(p | state, batch, keys())[0])(params) for loss in losses]

    for step, same in ((2, True), (3, False)):
        late, never = grads(step, params)
        pairs = zip(*(jax.tree.leaves(found["vae_decoder"]) for found in (late, never)), strict=True)
        alike = [np.allclose(a, b) for a, b in pairs]
        assert all(alike) is same
        assert max(np.abs(x).max() for x in jax.tree.leaves(late["discriminator"])) > 1e-4  # which learns meanwhile
    assert not any(np.any(x) for x in jax.tree.leaves((late["vae"], late["text_encoder"])))


@pytest.mark.slow
def test_redrawn_latents_are_those_of_a_sampler():
    """Each image from its own point of the way, by its own caption, as `sample` draws it with DDIM."""
    model, how = whole_model(), RedrawOptions(strength=0.8, steps=3, guidance_scale=4.0)
    params, rng = tiny_params(model), np.random.default_rng(0)
    latents = rng.normal(size=(BATCH, 4, 4, model.vae.config.latent_channels)).astype(np.float32)
    batch = prepare_pairs(model)({"text": [f"{i} houses" for i in range(BATCH)]})
    found = jax.jit(lambda keys: redraw_latents(model, params, latents, batch, keys, how))(keys())
    ids = jaxdiff.tokenize(model, [f"{i} houses" for i in range(BATCH)]), jaxdiff.tokenize(model, [""] * BATCH)
    cond, none = (jaxdiff.encode_text(model, params, tokens) for tokens in ids)
    schedule, last = noise_schedule(model.scheduler), model.scheduler.num_train_timesteps - 1
    noise = per_example(jax.random.normal, fold_in_each(keys(), 1), latents.shape[1:])
    firsts = 0.8 * np.asarray(per_example(jax.random.uniform, keys(), ())) * last
    assert firsts.std() > 0.05 * last
    for i, first in enumerate(firsts):
        times = at(schedule, np.floor(first * np.array([1, 2 / 3, 1 / 3, 0], np.float32)))
        one = slice(i, i + 1)
        denoise = jaxdiff.denoiser(
            model, params, *(jax.tree.map(lambda x, one=one: x[one], c) for c in (cond, none)), 4.0
        )
        x = times.alpha[0] * latents[one] + times.sigma[0] * noise[one]
        _, x0 = jaxdiff.sample(denoise, x, times, jaxdiff.get_scheduler("ddim"), jax.random.key(0), trajectory=True)
        np.testing.assert_allclose(found[one], x0[-1], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_decoder_of_redrawn_latents_learns_them_alone(tiny):
    adversary = {**TINY["adversary"], "weight": 0.0}
    found = make(settings("vae_decoder", adversary=adversary, redraw={"strength": 0.5, "steps": 2}), *tiny)
    batch = found.stage.prepare({"text": ["a house"] * BATCH, "image": random_images(BATCH)})
    state = {STATE: {"step": jnp.int32(0)}}
    value, grads = jax.jit(jax.value_and_grad(lambda p: found.stage.loss(p | state, batch, keys())[0]))(found.params)
    as_encoded = make(settings("vae_decoder", adversary=adversary), *tiny)
    other, metrics = as_encoded.stage.loss(as_encoded.params | state, batch, keys())
    assert value != other
    assert set(metrics) == {"reconstruction", "psnr"}
    moved = {name for name, g in grads.items() if any(np.any(x) for x in jax.tree.leaves(g))}
    assert moved == {"vae_decoder"}


def test_the_feature_distance_sees_what_the_vision_encoder_sees():
    model = whole_model()
    params, images = tiny_params(model), random_images(2) / np.float32(127.5) - 1
    distance = jax.jit(functools.partial(feature_distance, model))
    assert distance(params, images, images) == 0
    near, far = (distance(params, images + d, images) for d in (0.05, 0.5))
    assert 0 < near < far


def test_splitting_and_merging_lose_nothing(tiny):
    split = split_decoder(tiny[1])
    assert set(split["vae"]) == {"encoder", "quant_conv"}
    merged = merge_decoder({**split, "discriminator": {}})
    assert jax.tree.structure(merged) == jax.tree.structure(tiny[1])


# --- a run


@pytest.fixture
def run(tmp_path, tiny_folder):
    """(name of a workdir, settings) -> its run, trained."""
    write_houses(tmp_path / "data")

    def train(name: str, **changes):
        config = settings("vae_decoder", **TINY, batch_size=4, warmup_steps=0, schedule="constant", **changes)
        config.update(
            {"learning_rate": 1e-3, "discriminator_b1": 0.5, "accumulate": 2, "eval_every": 0, "log_every": 1}
        )
        config.init_from.model, config.eval.images = str(tiny_folder), 4
        config.data.update({"path": str(tmp_path / "data"), "image_size": SIDE, "threads": 1})
        check_settings(config)
        built = build_run(config, tmp_path / name)
        built.train()
        return jaxdiff.load(tmp_path / name / "export")

    return train


@pytest.mark.slow
def test_a_run_changes_the_decoder_alone_and_goes_on_bit_for_bit(run, tiny, tmp_path):
    model, params = run("whole", steps=3)
    run("parts", steps=2)
    _, resumed = run("parts", steps=3)
    jax.tree.map(np.testing.assert_array_equal, params, resumed)
    assert model == tiny[0]  # the latents' scale too
    before, after = (jax.tree_util.tree_leaves_with_path(p) for p in (tiny[1], params))
    pairs = zip(before, after, strict=True)
    moved = {"/".join(key.key for key in path[:2]) for (path, a), (_, b) in pairs if np.any(a != b)}
    assert moved == {"vae/decoder", "vae/post_quant_conv"}
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert {"weight", "score_real", "score_fake", "generator", "discriminator"} <= set(lines[-2]) | set(lines[-1])
    assert any("eval_psnr" in line for line in lines)


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        ("vae_decoder", {"adversary": {"loss": "wasserstein"}}, "adversary.loss 'wasserstein' must be one of hinge"),
        ("vae_decoder", {"adversary": {"augment": ("blur",)}}, "must be one of color"),
        ("vae_decoder", {"cache_latents": 1}, "cache_latents=1: the stage vae_decoder does not read this"),
        ("vae", {"feature_weight": 1.0}, "feature_weight=1.0: the stage vae does not read this"),
        ("unet", {"adversary": {"init_from": "x"}}, "adversary.init_from=x: the stage unet does not read this"),
        ("unet", {"redraw": {"strength": 0.5}}, "redraw.strength=0.5: the stage unet does not read this"),
        ("vae_decoder", {"redraw": {"strength": 0.5}, "crop": 8}, "redraw.strength=0.5 does not go with crop=8"),
        ("vae_decoder", {"redraw": {"strength": 1.5}}, "redraw.strength 1.5 must be"),
        ("vae_decoder", {"discriminator_b1": 1.0}, "discriminator_b1 1.0 must be"),
    ],
)
def test_settings_that_cannot_be_are_refused(stage, changes, message):
    with pytest.raises(OptionsError, match=message):
        check_settings(settings(stage, **changes))


def test_a_feature_distance_without_a_vision_encoder_is_refused(tiny):
    with pytest.raises(OptionsError, match=r"feature_weight 1\.0 needs a vision encoder"):
        make(settings("vae_decoder", feature_weight=1.0, **TINY), *tiny)
