"""A text-conditional GAN: its networks, its stage, a run of train.py, and how it draws."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

import jaxdiff
from jaxdiff import parallel
from jaxdiff.cli import serve
from jaxdiff.cli.errors import UsageError
from jaxdiff.cli.serve_options import parse as parse_serve
from jaxdiff.config import ConfigError, GeneratorConfig
from jaxdiff.errors import ArgumentError, WeightsError
from jaxdiff.evaluation.command import drawing_options
from jaxdiff.evaluation.flags import parse as parse_evaluation
from jaxdiff.io import pretrained
from jaxdiff.io.images import read_metadata
from jaxdiff.models.generator import text_state
from jaxdiff.models.model import apply, with_controlnets
from jaxdiff.training.checks import check_settings
from jaxdiff.training.optimizer import optimizer
from jaxdiff.training.options import OptionsError
from jaxdiff.training.run import build_run
from jaxdiff.training.train_step import init_state, make_train_step
from jaxdiff.training.trainables import make
from tests.support.commands import CASTLE
from tests.support.stages import keys, options, settings, write_houses
from tests.support.tiny import LATENT, SIDE, tiny_model, tiny_params, tokenizer

IMAGE = np.zeros((SIDE, SIDE, 3), np.uint8)
SIZES = {
    "generator": {"features": 4, "layers": 1, "heads": 2, "noise_dim": 8, "style_dim": 16},
    "adversary": {"features": 4, "layers": 1, "loss": "relativistic", "r1": 0.5, "r2": 0.5},
}


def gan_settings(**changes):
    config = settings("gan", **SIZES)
    config.data.image_size = SIDE
    for name, value in changes.items():
        config[name].update(value) if isinstance(value, dict) else config.update({name: value})
    return config


@pytest.fixture(scope="module")
def gan(tiny):
    """(model, parameters), none of them zero."""
    model = make(gan_settings(), *tiny).model
    return model, tiny_params(model)


@pytest.fixture(scope="module")
def gan_folder(gan, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gan") / "gan"
    jaxdiff.save(folder, *gan)
    return folder


# --- the generator


def test_the_mean_of_a_text_counts_tokens_as_the_mask_says():
    states, mask = jnp.arange(12.0).reshape(1, 4, 3), jnp.asarray([[1.0, 1.0, 0.0, 0.0]])
    np.testing.assert_allclose(text_state(states, mask), text_state(states[:, :2]))
    np.testing.assert_allclose(text_state(states), states.mean(1))


@pytest.mark.slow
def test_noise_and_text_decide_the_latents_and_what_a_mask_hides_does_not(gan):
    model, params = gan
    rng = np.random.default_rng(0)
    noise, text = rng.normal(size=(2, *LATENT)), rng.normal(size=(2, 6, 16))
    mask = jnp.asarray([[1.0, 1.0, 1.0, 0.0, 0.0, 0.0]] * 2)

    @jax.jit
    def drawn(noise, text):
        return apply(model, params, "unet", noise, None, text, None, None, mask)

    first = drawn(noise, text)
    assert first.shape == (2, *LATENT)
    hidden = text + np.pad(np.ones((2, 3, 16)), ((0, 0), (3, 0), (0, 0)))
    np.testing.assert_allclose(drawn(noise, hidden), first, atol=1e-5)
    for other in (drawn(noise[::-1], text), drawn(noise, text[::-1])):
        assert np.abs(other - first).mean() > 0.05 * np.std(first)


# --- drawing


@pytest.mark.slow
def test_an_image_is_what_the_generator_makes_of_its_seeds_noise(gan):
    model, params = gan
    noise = np.random.default_rng(0).normal(size=(1, *LATENT)).astype(np.float32)
    cond = jaxdiff.encode_text(model, params, jaxdiff.tokenize(model, "a castle"))
    latents = apply(model, params, "unet", noise, None, *cond)
    expected = np.round(255 * jaxdiff.decode(model, params, latents))
    found = jaxdiff.generate(model, params, "a castle", noise=noise).astype(int)
    assert np.abs(found - expected).max() <= 1
    assert expected.std() > 1
    assert np.abs(jaxdiff.generate(model, params, "a castle", seed=5).astype(int) - found).max() > 1


def test_a_folder_holds_the_generator_and_opens_again(gan, gan_folder):
    model, params = jaxdiff.load(gan_folder)
    assert model == gan[0]
    jax.tree.map(np.testing.assert_array_equal, params, gan[1])
    index = json.loads((gan_folder / "model_index.json").read_text())
    assert index["unet"] == ["jaxdiff", "TextConditionalGenerator"]
    assert index["_steps"] == 1
    with pytest.raises(WeightsError, match="A single file cannot hold a GAN"):
        jaxdiff.save(gan_folder.parent / "gan.safetensors", *gan)
    with pytest.raises(ConfigError, match="ControlNets are for models with a UNet"):
        with_controlnets(*gan, (None, {}))


@pytest.mark.parametrize(
    "values", [{"sample_size": 10}, {"block_out_channels": []}, {"noise_dim": 0}, {"block_out_channels": [8, -8]}]
)
def test_sizes_that_make_no_generator_are_refused(values):
    with pytest.raises(ConfigError, match=r"sample_size 10 must be divisible|sizes below 1"):
        GeneratorConfig.from_dict(values)


@pytest.mark.parametrize(
    "given",
    [
        {"steps": 2},
        {"scheduler": "euler"},
        {"spacing": "karras"},
        {"guidance_scale": 3.0},
        {"guidance_interval": (0.1, 2.0)},
        {"guidance_rescale": 0.5},
        {"negative_prompts": "blurry"},
        {"image": IMAGE},
        {"image": IMAGE, "mask": IMAGE[..., 0]},
        {"hires": 2.0},
        {"frames": 1},
        {"height": 2 * SIDE},
        {"width": 2 * SIDE},
    ],
)
def test_what_a_gan_has_no_use_for_is_refused(gan, given):
    with pytest.raises(ArgumentError) as caught:
        jaxdiff.generate(*gan, "a castle", **given)
    assert caught.value.argument == next(iter(given))


def test_the_command_draws_and_draws_again(sample_cli, gan, gan_folder):
    code, out, err = sample_cli(CASTLE, "--seed=3", "--output=a.png", model=gan_folder)
    assert (code, out) == (0, ["a.png"]), err
    kept = read_metadata("a.png")
    assert not {"steps", "scheduler", "guidance_scale"} & set(kept)
    found = np.asarray(Image.open("a.png")).astype(int)
    assert np.abs(found - jaxdiff.generate(*gan, "a castle", seed=3)[0]).max() <= 1
    code, out, err = sample_cli("--from_png=a.png", "--output=b.png", model=None)
    assert (code, out) == (0, ["b.png"]), err
    np.testing.assert_array_equal(np.asarray(Image.open("b.png")), found)


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--steps=4", "--steps is for models that remove noise step by step"),
        ("--scheduler=euler", "--scheduler is for models that remove noise step by step"),
        ("--spacing=karras", "--spacing is for models that remove noise step by step"),
        ("--guidance_scale=3", "--guidance_scale is for guidance, which this model does not use"),
        ("--negative_prompt=x", "--negative_prompt is for guidance"),
        ("--image=a.png", "--image is for models that redraw images"),
        ("--hires=2", "--hires is for models that remove noise step by step"),
        ("--preview", "--preview shows images as they form"),
        ("--height=32", "--height 32 must be 16, the only size"),
    ],
)
def test_flags_that_mean_nothing_are_refused_in_a_sentence(sample_cli, gan_folder, flag, said):
    Image.fromarray(IMAGE).save("a.png")
    code, out, err = sample_cli(CASTLE, flag, model=gan_folder)
    assert (code, out) == (2, [])
    assert said in err


def test_the_server_refuses_it_and_the_evaluation_draws_it_as_it_is(gan_folder):
    with pytest.raises(UsageError, match="--model is a GAN"):
        serve.load_model(parse_serve(["serve", f"--model={gan_folder}"]))
    model = pretrained.described(gan_folder)[0]
    wanted = drawing_options(parse_evaluation(["evaluation", f"--model={gan_folder}", "--prompts=x"]), model)
    assert not any(wanted.values())
    with pytest.raises(UsageError, match="--steps is for models that remove noise step by step"):
        drawing_options(parse_evaluation(["evaluation", f"--model={gan_folder}", "--prompts=x", "--steps=3"]), model)


# --- the stage


@pytest.mark.slow
def test_each_gradient_is_that_of_finite_differences():
    """Of the generator's loss and of the discriminator's, each by its own network's parameters."""
    with jax.enable_x64(True):
        model = tiny_model(dtype=jnp.float64)
        made = make(gan_settings(), model, tiny_params(model))
        rng = np.random.default_rng(0)
        batch = {"latents": rng.normal(size=(2, *LATENT)), "tokens": tokenizer()(["a castle", "a red dragon"])}
        params = jax.tree.map(lambda x: np.asarray(x, np.float64), made.params)
        learnt = {name: params[name] for name in made.stage.trainable}
        drawn = [jax.tree.map(lambda x: rng.normal(size=x.shape) / 3, learnt) for _ in range(2)]
        learnt, towards = jax.tree.map(np.add, learnt, drawn[0]), drawn[1]

        @jax.jit
        def found(learnt):
            def loss(learnt):
                return made.stage.loss({**params, **learnt}, batch, keys(2))

            (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(learnt)
            return metrics, grads

        grads = found(learnt)[1]
        for network, loss in (("unet", "generator"), ("discriminator", "discriminator")):
            ends = []
            for eps in (1e-5, -1e-5):
                moved = jax.tree.map(lambda a, d, eps=eps: a + eps * d, learnt[network], towards[network])
                ends.append(float(found({**learnt, network: moved})[0][loss]))
            expected = (ends[0] - ends[1]) / 2e-5
            assert abs(expected) > 1e-3
            np.testing.assert_allclose(float(optax.tree.vdot(grads[network], towards[network])), expected, rtol=1e-4)


@pytest.mark.slow
def test_it_learns_to_draw_what_each_prompt_asks_for(tiny):
    """Latents of one value a channel for each of three texts, with a little noise; the losses stay finite.

    The texts' states are given, because the tiny encoder's random weights hardly tell its prompts apart.
    """
    config = gan_settings(generator={"features": 8}, adversary={"features": 8, "r1": 0.1, "r2": 0.1})
    made, rng = make(config, *tiny), np.random.default_rng(0)
    wanted = np.asarray([[1, -1, 0, 1], [-1, 1, 1, 0], [0, 0, -1, -1]], np.float32)
    rows, steps, mesh = 24, 200, parallel.mesh(devices=jax.devices()[:1])
    o = options(steps=steps, batch_size=rows, learning_rate=3e-3, b1=0.0, b2=0.99, clip_norm=0.0, ema_decay=0.97)
    state = init_state({name: made.params[name] for name in made.stage.trainable}, optimizer(o), mesh)
    frozen = {name: x for name, x in made.params.items() if name not in made.stage.trainable}
    step = make_train_step(made.stage.loss, o, mesh, state, made.stage.dtypes)
    texts, which = rng.normal(size=(3, 12, 16)).astype(np.float32), np.arange(rows) % 3
    losses = []
    for _ in range(steps):
        latents = wanted[which][:, None, None] + 0.1 * rng.normal(size=(rows, *LATENT)).astype(np.float32)
        state, metrics = step(state, frozen, {"latents": latents, "embeddings": texts[which]})
        losses.append((float(metrics["loss"]), int(metrics["skipped"])))
    assert np.isfinite(losses).all()
    assert not any(skipped for _, skipped in losses)
    assert np.mean(losses[-20:], 0)[0] < 3  # near 2 log 2, where neither wins
    noise = rng.normal(size=(rows, *LATENT)).astype(np.float32)
    drawn = np.asarray(apply(made.model, {"unet": state.ema["unet"]}, "unet", noise, None, texts[which]))
    means = np.stack([drawn[which == i].mean((0, 1, 2)) for i in range(3)])
    assert np.abs(means - wanted).mean() < 0.25
    nearest = ((drawn.mean((1, 2))[:, None] - wanted) ** 2).sum(-1).argmin(1)
    assert (nearest == which).mean() > 0.9


# --- a run


@pytest.fixture
def run(tmp_path, tiny_folder):
    """(name of a workdir, settings) -> its run, trained."""
    write_houses(tmp_path / "data")

    def train(name: str, **changes):
        config = gan_settings(batch_size=4, warmup_steps=0, schedule="constant", b1=0.0, cache_latents=1, **changes)
        config.update({"learning_rate": 1e-3, "accumulate": 2, "eval_every": 0, "log_every": 1})
        config.init_from.model, config.eval.prompts = str(tiny_folder), ("a house", "a castle")
        config.data.update({"path": str(tmp_path / "data"), "image_size": SIDE, "threads": 1})
        check_settings(config)
        build_run(config, tmp_path / name).train()
        return jaxdiff.load(tmp_path / name / "export")

    return train


@pytest.mark.slow
def test_a_run_makes_a_model_that_draws_and_goes_on_bit_for_bit(run, tiny, tmp_path):
    model, params = run("whole", steps=3)
    run("parts", steps=2)
    _, resumed = run("parts", steps=3)
    jax.tree.map(np.testing.assert_array_equal, params, resumed)
    assert model.is_gan
    assert set(params) == set(tiny[1])  # the discriminator stays behind
    for name in ("text_encoder", "vae"):
        jax.tree.map(np.testing.assert_array_equal, params[name], tiny[1][name])
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert {"score_real", "score_fake", "r1", "r2", "generator", "discriminator", "deviation"} <= set().union(*lines)
    assert (tmp_path / "whole" / "samples" / "step-000003.png").is_file()
    assert jaxdiff.generate(model, params, ["a house", "a castle"]).shape == (2, SIDE, SIDE, 3)


def test_a_gan_goes_on_as_one_and_as_nothing_else(gan):
    made = make(gan_settings(), *gan)
    jax.tree.map(np.testing.assert_array_equal, made.params["unet"], gan[1]["unet"])
    with pytest.raises(OptionsError, match=r"stage 'unet' is for models that remove noise"):
        make(settings("unet"), *gan)
    with pytest.raises(OptionsError, match=r"data.image_size must be 16, the only size"):
        make(gan_settings(data={"image_size": 2 * SIDE}), *gan)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"generator": {"layers": 4}}, "generator.layers 4: the images have 8 latents along a side"),
        ({"adversary": {"layers": 4}}, "adversary.layers 4: the images have 8 latents along a side"),
        ({"generator": {"heads": 3}}, "generator.heads 3 must divide twice generator.features 4"),
        ({"trainable": ("text_encoder",)}, "means nothing to the stage gan"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(tiny, changes, message):
    with pytest.raises(OptionsError, match=message):
        make(gan_settings(**changes), *tiny)


@pytest.mark.parametrize(
    "changes",
    [{"offset_noise": 0.1}, {"prediction_type": "epsilon"}, {"data": {"buckets": 8}}, {"crop": 8},
     {"adversary": {"init_from": "x"}}, {"prior_preservation": {"path": "x"}}],
)  # fmt: skip
def test_settings_that_the_stage_does_not_read_are_refused(changes):
    with pytest.raises(OptionsError, match="the stage gan does not read this"):
        check_settings(settings("gan", **changes))
