"""What can be taught to a finished model: each target learns, moves what it should alone, and comes out as files."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from jaxdiff import parallel
from jaxdiff.config import ConfigError, SchedulerConfig
from jaxdiff.io.textual_inversion import TABLE
from jaxdiff.models.model import build
from jaxdiff.training import finetune, on_eval
from jaxdiff.training.metrics import noise_levels, reconstructions
from jaxdiff.training.on_eval import make_draw, place_params
from jaxdiff.training.options import OptionsError
from jaxdiff.training.train_step import accumulated_grad
from jaxdiff.training.trainables import make, process
from tests.support.stages import BATCH, keys, random_images, settings, trained
from tests.support.tiny import SCHEDULER, SIDE, UNET, VAE, text_config, tiny_model, tiny_params, tokenizer

BOTH = (("trainable", ("unet", "text_encoder")),)
TEXTS = ["a castle", "a red dragon", "a blue house", "blurry"]


@pytest.fixture(scope="module")
def target_of(tiny):
    """The target of a config, and a batch for it; each made once."""

    @functools.cache
    def make_once(stage, *changes):
        texts = [f"{t} <cat>" for t in TEXTS] if stage == "textual_inversion" else TEXTS
        target = make(settings(stage, **dict(changes)), *tiny)
        return target, target.stage.prepare({"image": random_images(BATCH), "text": texts})

    return make_once


def moved(old, new) -> set[str]:
    """The names of arrays that differ."""
    old, new = flatten_dict(old, sep="/"), flatten_dict(new, sep="/")
    assert old.keys() == new.keys()
    return {name for name in old if not np.array_equal(old[name], new[name])}


# --- every target


@pytest.fixture(scope="module")
def results(target_of):
    rates = {"textual_inversion": 0.1, "lora": 3e-2, "controlnet": 1e-2}

    @functools.cache
    def run(stage, *changes):
        target, batch = target_of(stage, *changes)
        return trained(target.stage, target.params, batch, rate=rates.get(stage, 3e-3))

    return run


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["unet", "lora", "textual_inversion", "controlnet", "inpainting", "upscaler"])
def test_the_loss_of_every_target_falls(results, stage):
    _, before, after = results(stage, *(BOTH if stage == "lora" else ()))
    # A word can only change what the text says, so that it gains the least.
    assert after < before * (0.999 if stage == "textual_inversion" else 0.95)


def test_a_lora_changes_the_layers_it_names_alone(results, target_of, tiny):
    params, _, _ = results("lora", *BOTH)
    target, _ = target_of("lora", *BOTH)
    whole = target.merge_params(params)
    changed = moved(tiny[1], whole)
    assert {name.split("/")[0] for name in changed} == {"unet", "text_encoder"}
    assert all(name.split("/")[-2].endswith(("to_q", "to_k", "to_v", "to_out_0", "_proj")) for name in changed)
    assert moved(tiny[1], {k: v for k, v in params.items() if k != "lora"}) == set()
    only, _ = target_of("lora")
    assert {name.split(".")[0] for name in only.params["lora"]} == {"unet"}


def test_only_the_new_rows_of_the_table_move(results, target_of, tiny):
    params, _, _ = results("textual_inversion")
    target, _ = target_of("textual_inversion")
    whole = jax.device_get(target.merge_params(params))
    table = whole["text_encoder"].pop(TABLE)["embedding"]
    assert moved({k: v for k, v in tiny[1]["text_encoder"].items() if k != TABLE}, whole["text_encoder"]) == set()
    assert moved(tiny[1]["unet"], whole["unet"]) == set()
    old = tiny[1]["text_encoder"][TABLE]["embedding"]
    np.testing.assert_array_equal(table[: len(old)], old)
    start = target.params["words"]["text_encoder"]
    assert table.shape == (len(old) + 2, old.shape[1])
    np.testing.assert_array_equal(table[len(old) :], params["words"]["text_encoder"])
    (ids,) = tokenizer().encode(["castle"])
    np.testing.assert_allclose(start, np.tile(np.asarray(old)[ids].mean(0), (2, 1)), rtol=1e-6)
    assert (table[len(old) :] != start).all()


def test_a_controlnet_starts_as_no_change_and_learns_from_its_image(results, target_of, tiny):
    target, _ = target_of("controlnet")
    params, before, _ = results("controlnet")
    np.testing.assert_allclose(before, results("unet")[1], rtol=1e-5)
    assert moved(tiny[1], {k: v for k, v in params.items() if k != "controlnet"}) == set()
    # Its gradient is made of the steering image's features.
    assert "controlnet_cond_embedding/conv_out/kernel" in moved(
        jax.device_get(target.params["controlnet"][0]), params["controlnet"][0]
    )


def test_edges_are_found_unless_an_image_of_them_is_given(target_of):
    _, batch = target_of("controlnet")
    assert set(np.unique(batch["hint"])) == {0, 255}
    given = np.full((BATCH, SIDE, SIDE, 3), 7, np.uint8)
    target, _ = target_of("controlnet")
    again = target.stage.prepare({"image": random_images(BATCH), "hint": given, "text": TEXTS})
    np.testing.assert_array_equal(again["hint"], given)


@pytest.mark.parametrize("stage", ["inpainting", "upscaler"])
def test_new_channels_start_without_weight(results, target_of, stage):
    np.testing.assert_allclose(results(stage)[1], results("unet")[1], rtol=1e-5)
    target, _ = target_of(stage)
    assert target.model.unet.config.in_channels == {"inpainting": 9, "upscaler": 7}[stage]
    again, params = getattr(finetune, f"{stage}_model")(target.model, target.params)
    assert again is target.model or again == target.model
    assert moved(target.params, params) == set()


def test_new_channels_are_used(results, target_of):
    for stage, count in (("inpainting", 9), ("upscaler", 7)):
        params, _, _ = results(stage)
        new = params["unet"]["conv_in"]["kernel"][:, :, 4:]
        assert new.shape[2] == count - 4
        assert (np.abs(new).max((0, 1, 3)) > 0).all()
    table = results("upscaler")[0]["unet"]["class_embedding"]["embedding"]
    assert 0 < (np.abs(table).max(1) > 0).sum() < len(table)  # of the noise levels that were drawn


def test_masks_are_rectangles_and_sometimes_everything():
    masks = np.asarray(finetune.random_masks(keys(256), 32, 24))
    assert masks.shape == (256, 32, 24, 1)
    shares = masks.mean((1, 2, 3))
    assert shares.min() > 0
    # Everything for a quarter of them, a deviation of sqrt(3/16/256) = 0.027; five of them.
    assert abs((shares == 1).mean() - finetune.FULL_MASK_SHARE) < 0.14
    assert 0.1 < shares[shares < 1].mean() < 0.8
    assert len(np.unique(shares)) > 100


def test_a_model_of_other_channels_is_refused(tiny):
    model, params = finetune.with_input_channels(*tiny, 5)
    with pytest.raises(ConfigError, match="5 input channels"):
        finetune.inpainting_model(model, params)


def test_what_is_frozen_gets_no_gradient(target_of):
    """Counted in the program before anything is optimised away."""
    mesh = parallel.mesh(devices=jax.devices()[:1])

    def work(stage: str) -> float:
        target, batch = target_of(stage)
        trained = {k: target.params[k] for k in target.stage.trainable}
        frozen = {k: v for k, v in target.params.items() if k not in trained}
        grad = jax.jit(lambda p: accumulated_grad(target.stage.loss, p, frozen, batch, keys(), 1, mesh)[0])
        return grad.lower(trained).cost_analysis()["flops"]

    assert work("lora") < 0.85 * work("unet")


def test_only_what_networks_alone_read_may_be_gathered_in_their_type(target_of):
    """A LoRA is merged, and a new word put in its table, in float32 whatever the network computes in."""
    names = {
        stage: set(target_of(stage)[0].stage.dtypes) for stage in ("unet", "controlnet", "lora", "textual_inversion")
    }
    assert names["lora"] == names["textual_inversion"] == set()
    assert names["unet"] == {"text_encoder", "unet", "vae"}
    assert names["controlnet"] == names["unet"] | {"controlnet"}


# --- how it is evaluated


@pytest.mark.slow
def test_the_loss_by_noise_level_does_not_depend_on_the_batches(target_of):
    """Nor do the masks drawn for it."""
    target, batch = target_of("inpainting")
    how = {"network": target.network, "levels": 2}
    found = []
    for sizes in ([4], [3, 1]):
        ends = np.cumsum(sizes)
        batches = [{k: v[e - n : e] for k, v in batch.items()} for n, e in zip(sizes, ends, strict=True)]
        found.append(list(noise_levels(target.model, batches, **how)(target.params).values()))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)  # sums in another order
    images = batch["image"]
    whole, psnr = reconstructions(target.model, [images])(target.params)
    parts, psnr_of_parts = reconstructions(target.model, [images[:3], images[3:]])(target.params)
    assert np.abs(whole.astype(int) - parts).max() <= 1  # what lies next to a half may be rounded the other way
    np.testing.assert_allclose(psnr_of_parts["eval_psnr"], psnr["eval_psnr"], rtol=1e-5)


@pytest.mark.slow
def test_it_is_evaluated_as_it_is_trained(target_of, results):
    """In the types of a training step, what is trained being merged within it."""
    target, batch = target_of("lora", *BOTH)
    params, _, _ = results("lora", *BOTH)
    on_device = place_params(params, target, settings("lora", frozen_dtype="bfloat16"))
    assert {str(x.dtype) for x in jax.tree.leaves(on_device["lora"])} == {"float32"}
    assert {str(x.dtype) for name in ("unet", "vae") for x in jax.tree.leaves(on_device[name])} == {"bfloat16"}
    measure = noise_levels(target.model, [batch], network=target.network, merge_params=target.merge_params, levels=2)
    merged = noise_levels(target.model, [batch], network=target.network, levels=2)
    values = measure(place_params(params, target, settings("lora")))
    np.testing.assert_allclose(list(values.values()), list(merged(target.merge_params(params)).values()), rtol=1e-5)
    # bfloat16 keeps 8 bits (4e-3), through some ten layers.
    np.testing.assert_allclose(measure(on_device)["eval_loss"], values["eval_loss"], rtol=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["unet", "controlnet"])
def test_a_device_draws_no_more_of_a_sheet_at_a_time_than_it_trains_on(target_of, stage, monkeypatch):
    """And the sheet is the same: each image from its own seed, and in the place of what it was given."""
    target, _ = target_of(stage)
    held_out = [{"image": random_images(2, seed=i), "text": TEXTS[2 * i : 2 * i + 2]} for i in range(2)]
    config = settings(stage, eval={"prompts": tuple(TEXTS[:3]), "steps": 2}).eval
    sizes, sheets, generate = [], [], on_eval.generate
    monkeypatch.setattr(on_eval, "generate", lambda *args, **k: sizes.append(len(args[2])) or generate(*args, **k))
    for at_once in (4, 2):
        draw = make_draw(config, target, held_out, at_once)
        sheets.append(draw(0, target.merge_params(target.params)).images.astype(int))
    devices = jax.local_device_count()
    assert sizes == ([3, 2, 2] if devices == 1 else [3, 3])
    assert np.abs(sheets[0] - sheets[1]).max() <= 1
    # What is drawn differs from image to image; a row of a ControlNet's sheet has three.
    assert len({image.tobytes() for image in sheets[0][1 if stage == "controlnet" else 0 :: len(sheets[0]) // 3]}) == 3


@pytest.mark.parametrize("stage", ["textual_inversion", "controlnet"])
def test_what_a_stage_does_not_train_cannot_be_chosen(stage, tiny):
    with pytest.raises(OptionsError, match=r"trainable .* means nothing"):
        make(settings(stage, trainable=("unet", "text_encoder")), *tiny)


# --- SDXL


@pytest.mark.slow
def test_sdxl_learns_with_its_sizes_and_both_encoders(tmp_path):
    text_2 = dataclasses.replace(text_config(), with_projection=True, projection_dim=20, hidden_act="gelu")
    unet = dataclasses.replace(
        UNET, cross_attention_dim=32, addition_embed_type="text_time", addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=20 + 6 * 4,
    )  # fmt: skip
    model = build(text_config(), unet, VAE, tokenizer(), SCHEDULER, text_2=text_2, tokenizer_2=tokenizer())
    assert model.family == "sdxl"
    params = tiny_params(model)
    target = make(settings("unet", trainable=("unet", "text_encoder_2")), model, params)
    batch = target.stage.prepare({"image": random_images(BATCH), "text": TEXTS})
    loss = jax.jit(target.stage.loss)
    whole = np.tile(np.float32([SIDE, SIDE, 0, 0, SIDE, SIDE]), (BATCH, 1))
    first = loss(params, batch, keys())[0]
    assert first == loss(params, {**batch, "time_ids": whole}, keys())[0]
    assert first != loss(params, {**batch, "time_ids": whole / 2}, keys())[0]
    other = {**batch, "tokens_2": batch["tokens_2"][::-1]}
    assert first != loss(params, other, keys())[0]
    # Without their captions examples are told zeros: what differs has no effect left.
    dropped = jax.jit(make(settings("unet", caption_dropout=1.0), model, params).stage.loss)
    assert dropped(params, batch, keys())[0] == dropped(params, other, keys())[0]


# --- what is predicted


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow_prediction"])
def test_every_prediction_type_is_learnt(tiny, kind, target_of):
    target, batch = target_of("unet", ("prediction_type", kind))
    assert target.model.scheduler.prediction_type == kind
    assert (target.model.scheduler.beta_schedule == "flow") == (kind == "flow_prediction")
    losses = {k: float(target_of("unet", ("prediction_type", k))[0].stage.loss(tiny[1], batch, keys())[0])
              for k in ("epsilon", kind)}  # fmt: skip
    assert kind == "epsilon" or losses[kind] != losses["epsilon"]


def test_zero_terminal_snr_is_asked_for(target_of):
    target, _ = target_of("unet", ("prediction_type", "v_prediction"), ("zero_terminal_snr", True))
    scheduler = target.model.scheduler
    assert scheduler.rescale_betas_zero_snr
    assert scheduler.timestep_spacing == "trailing"
    for kind in ("", "flow_prediction"):  # the model's own is epsilon
        with pytest.raises(OptionsError, match="zero_terminal_snr needs another prediction_type"):
            process(settings("unet", prediction_type=kind, zero_terminal_snr=True), SCHEDULER)
    flow = SchedulerConfig.from_dict({"_class_name": "FlowMatchEulerDiscreteScheduler"})
    for kind in ("", "flow_prediction"):
        assert process(settings("unet", prediction_type=kind), flow) == flow
    for kind in ("epsilon", "v_prediction", "sample"):  # PyTorch diffusers would draw noise with the export
        with pytest.raises(OptionsError, match=f"prediction_type '{kind}' does not go with the model's FlowMatchEuler"):
            process(settings("unet", prediction_type=kind), flow)
    with pytest.raises(OptionsError, match="prediction_type 'x0'"):
        process(settings("unet", prediction_type="x0"), SCHEDULER)
    with pytest.raises(OptionsError, match="trainable"):
        make(settings("unet", trainable=("vae",)), tiny_model(), {})
