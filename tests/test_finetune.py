"""What can be taught to a finished model: each target learns, moves what it should alone, and comes out as files."""

import dataclasses
import functools
import importlib
import json
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict
from PIL import Image

import train
from configs.common import base
from jaxdiff import parallel
from jaxdiff.commands.evaluation import placed
from jaxdiff.commands.train_flags import check_read
from jaxdiff.config import ConfigError
from jaxdiff.data.captioned import captioned_data
from jaxdiff.io.edges import canny
from jaxdiff.io.textual_inversion import TABLE
from jaxdiff.models.model import apply, build
from jaxdiff.training import finetune, personalise
from jaxdiff.training.evaluate import noise_levels, reconstructions
from jaxdiff.training.stages import Noising, vae_stage
from jaxdiff.training.state import Options, OptionsError, accumulated_grad, init_state, make_train_step, optimizer
from jaxdiff.training.targets import TARGETS, make, process
from tests.test_train_cli import ROOT
from tests.test_training import BATCH, keys, pictures
from tests.tiny import LATENT, MAX_LENGTH, SCHEDULER, SIDE, UNET, VAE, text_config, tiny_model, tiny_params, tokenizer

BOTH = (("trainable", ("unet", "text_encoder")),)
TEXTS = ["a castle", "a red dragon", "a blue house", "blurry"]


def settings(stage: str, **changes) -> ConfigDict:
    config = base()
    config.stage = stage
    config.word.update({"token": "<cat>", "initial": "castle", "vectors": 2})
    for name, value in {"caption_dropout": 0.0, **changes}.items():
        config[name].update(value) if isinstance(value, dict) else config.update({name: value})
    return config


@pytest.fixture(scope="module")
def target_of(tiny):
    """The target of a config, and a batch for it; each made once."""

    @functools.cache
    def make_once(stage, *changes):
        texts = [f"{t} <cat>" for t in TEXTS] if stage == "textual_inversion" else TEXTS
        target = make(settings(stage, **dict(changes)), *tiny)
        return target, target.stage.prepare({"image": pictures(BATCH), "text": texts})

    return make_once


def trained(target, batch, steps: int = 12, rate: float = 3e-3):
    """(all parameters after some steps, the loss at the same times and noises before and after)."""
    o = Options(steps, BATCH, learning_rate=rate, weight_decay=0.0, ema_decay=0.0)
    mesh = parallel.mesh(devices=jax.devices()[:1])
    state = init_state({k: target.params[k] for k in target.stage.trainable}, optimizer(o), mesh)
    step = make_train_step(target.stage.loss, o, mesh, state)
    frozen = {k: v for k, v in target.params.items() if k not in target.stage.trainable}
    losses = []
    for _ in range(steps):
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics["loss"]))
    params = jax.device_get({**frozen, **state.params})
    _, again = step(state._replace(step=jnp.zeros((), jnp.int32)), frozen, batch)  # at the first times and noises
    return params, losses[0], float(again["loss"])


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
        return trained(*target_of(stage, *changes), rate=rates.get(stage, 3e-3))

    return run


@pytest.mark.parametrize("stage", ["unet", "lora", "textual_inversion", "controlnet", "inpainting", "upscaler"])
def test_the_loss_of_every_target_falls(results, stage):
    _, before, after = results(stage, *(BOTH if stage == "lora" else ()))
    # A word can only change what the text says, so that it gains the least.
    assert after < before * (0.999 if stage == "textual_inversion" else 0.95)


def test_a_lora_changes_the_layers_it_names_alone(results, target_of, tiny):
    params, _, _ = results("lora", *BOTH)
    target, _ = target_of("lora", *BOTH)
    whole = target.whole(params)
    changed = moved(tiny[1], whole)
    assert {name.split("/")[0] for name in changed} == {"unet", "text_encoder"}
    assert all(name.split("/")[-2].endswith(("to_q", "to_k", "to_v", "to_out_0", "_proj")) for name in changed)
    assert moved(tiny[1], {k: v for k, v in params.items() if k != "lora"}) == set()
    only, _ = target_of("lora")
    assert {name.split(".")[0] for name in only.params["lora"]} == {"unet"}


def test_only_the_new_rows_of_the_table_move(results, target_of, tiny):
    params, _, _ = results("textual_inversion")
    target, _ = target_of("textual_inversion")
    whole = jax.device_get(target.whole(params))
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


def test_a_controlnet_starts_as_no_change_and_learns_from_its_picture(results, target_of, tiny):
    target, _ = target_of("controlnet")
    params, before, _ = results("controlnet")
    np.testing.assert_allclose(before, results("unet")[1], rtol=1e-5)
    assert moved(tiny[1], {k: v for k, v in params.items() if k != "controlnet"}) == set()
    # Its gradient is made of the steering picture's features.
    assert "controlnet_cond_embedding/conv_out/kernel" in moved(
        jax.device_get(target.params["controlnet"][0]), params["controlnet"][0]
    )


def test_edges_are_found_unless_a_picture_of_them_is_given(target_of):
    _, batch = target_of("controlnet")
    assert set(np.unique(batch["hint"])) == {0, 255}
    given = np.full((BATCH, SIDE, SIDE, 3), 7, np.uint8)
    target, _ = target_of("controlnet")
    again = target.stage.prepare({"image": pictures(BATCH), "hint": given, "text": TEXTS})
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
    assert abs((shares == 1).mean() - finetune.WHOLE_SHARE) < 0.14
    assert 0.1 < shares[shares < 1].mean() < 0.8
    assert len(np.unique(shares)) > 100


def test_a_model_of_other_channels_is_refused(tiny):
    model, params = finetune.extended(*tiny, 5)
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


def test_the_loss_by_noise_level_does_not_depend_on_the_batches(target_of):
    """Nor do the masks drawn for it."""
    target, batch = target_of("inpainting")
    how = {"network": target.network, "levels": 2}
    found = []
    for sizes in ([4], [3, 1], [2, 2]):
        ends = np.cumsum(sizes)
        batches = [{k: v[e - n : e] for k, v in batch.items()} for n, e in zip(sizes, ends, strict=True)]
        found.append(list(noise_levels(target.model, batches, **how)(target.params).values()))
    np.testing.assert_allclose(found[1:], found[:1] * 2, rtol=1e-5)  # sums in another order
    images = batch["image"]
    whole, psnr = reconstructions(target.model, [images])(target.params)
    parts, psnr_of_parts = reconstructions(target.model, [images[:3], images[3:]])(target.params)
    assert np.abs(whole.astype(int) - parts).max() <= 1  # what lies next to a half may be rounded the other way
    np.testing.assert_allclose(psnr_of_parts["eval_psnr"], psnr["eval_psnr"], rtol=1e-5)


def test_it_is_evaluated_as_it_is_trained(target_of, results):
    """In the types of a training step, what is trained being merged within it."""
    target, batch = target_of("lora", *BOTH)
    params, _, _ = results("lora", *BOTH)
    on_device = placed(params, target, settings("lora", frozen_dtype="bfloat16"))
    assert {str(x.dtype) for x in jax.tree.leaves(on_device["lora"])} == {"float32"}
    assert {str(x.dtype) for name in ("unet", "vae") for x in jax.tree.leaves(on_device[name])} == {"bfloat16"}
    measure = noise_levels(target.model, [batch], network=target.network, whole=target.whole, levels=2)
    merged = noise_levels(target.model, [batch], network=target.network, levels=2)
    values = measure(placed(params, target, settings("lora")))
    np.testing.assert_allclose(list(values.values()), list(merged(target.whole(params)).values()), rtol=1e-5)
    # bfloat16 keeps 8 bits (4e-3), through some ten layers.
    np.testing.assert_allclose(measure(on_device)["eval_loss"], values["eval_loss"], rtol=0.05)


@pytest.fixture
def run_of(folders, tiny_folder):
    """The run of train.py with these settings, of the class pictures."""

    def make_run(stage, **changes):
        config = settings(stage, **{"batch_size": 4 * jax.device_count(), **changes})
        config.init_from.model = str(tiny_folder)
        config.data.update({"path": str(folders / "class"), "image_size": SIDE, "threads": 1})
        return train.Run(config, folders / "run")

    return make_run


@pytest.mark.parametrize(("count", "sizes"), [(3, [2, 1]), (9, [2, 2])])
def test_a_device_is_given_no_more_pictures_than_in_a_step(run_of, count, sizes):
    held_out = run_of("unet", accumulate=2, eval={"pictures": count}).held_out()
    assert [len(b["image"]) for b in held_out] == [len(b["text"]) for b in held_out] == sizes


# --- settings of train.py reach what they are for


def test_the_weight_of_class_pictures(run_of, folders):
    _, _, batches, _ = run_of("unet", prior={"path": str(folders / "class"), "weight": 0.5}).parts()
    weights = next(iter(batches))["weight"]
    np.testing.assert_array_equal(weights, np.repeat(np.float32([1, 0.5]), len(weights) // 2))


def test_edges_are_found_where_pictures_are_decoded(run_of):
    for high, colours in ((200.0, {0, 255}), (2040.0, {0})):  # which no edge reaches
        run = run_of("controlnet", controlnet={"canny_high": high}, data={"flip": True})
        stage, _, batches, _ = run.parts()
        batch = next(iter(batches))
        edges = [canny(image, 100.0, high) for image in batch["image"]]
        np.testing.assert_array_equal(batch["hint"], edges)
        assert set(np.unique(batch["hint"])) == colours
        np.testing.assert_array_equal(stage.prepare({**batch, "hint": batch["image"]})["hint"], batch["image"])
        del batch["hint"]  # of data that come from elsewhere
        np.testing.assert_array_equal(stage.prepare(batch)["hint"], edges)


def test_weights_of_the_autoencoders_losses(run_of):
    stage, params, batches, _ = run_of("vae", kl_weight=2.0, edge_weight=0.0, eval={"pictures": 2}).parts()
    batch = stage.prepare(next(iter(batches)))
    args = params, batch, keys(len(batch["image"]))
    value, metrics = jax.jit(stage.loss)(*args)
    np.testing.assert_allclose(value, metrics["reconstruction"] + 2 * metrics["kl"], rtol=1e-5)
    _, with_edges = jax.jit(vae_stage(run_of("vae").model, edge_weight=1.0).loss)(*args)
    assert with_edges["reconstruction"] > metrics["reconstruction"]
    np.testing.assert_allclose(with_edges["kl"], metrics["kl"], rtol=1e-5)


@pytest.mark.parametrize("remat", ["", "full"])
def test_activations_are_computed_again_in_the_unet(run_of, tiny, remat):
    model = run_of("unet", remat=remat).model
    inputs = jnp.zeros((1, *LATENT)), jnp.zeros(1), jnp.zeros((1, MAX_LENGTH, UNET.cross_attention_dim))
    program = jax.make_jaxpr(lambda params: apply(model, params, "unet", *inputs))(tiny[1])
    assert ("checkpoint" in str(program) or "remat" in str(program)) == bool(remat)


@pytest.mark.parametrize("stage", ["textual_inversion", "controlnet"])
def test_what_a_stage_does_not_train_cannot_be_chosen(stage, tiny):
    with pytest.raises(OptionsError, match=r"trainable .* means nothing"):
        make(settings(stage, trainable=("unet", "text_encoder")), *tiny)


# --- SDXL


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
    batch = target.stage.prepare({"image": pictures(BATCH), "text": TEXTS})
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


# --- one's own pictures


@pytest.fixture
def folders(tmp_path):
    """A folder of three pictures without captions, and a captioned one of four others."""
    for name, count in (("mine", 3), ("class", 4)):
        (tmp_path / name).mkdir()
        for i in range(count):
            Image.fromarray(pictures(1, seed=i)[0]).save(tmp_path / name / f"{i}.png")
    lines = [json.dumps({"file_name": f"{i}.png", "text": "a house"}) for i in range(4)]
    (tmp_path / "class" / "metadata.jsonl").write_text("\n".join(lines))
    return tmp_path


def test_pictures_without_captions_get_those_of_the_config(folders):
    for _ in range(2):  # a second run finds the first one's folder
        path = personalise.captioned(folders / "mine", ("a photo of <cat>", "<cat>"), folders / "run")
    batches = iter(captioned_data(path, 3, SIDE, seed=0, threads=1))
    found = [next(batches) for _ in range(4)]
    assert {t for b in found for t in b["text"]} == {"a photo of <cat>", "<cat>"}
    assert len({b["image"][i].tobytes() for b in found for i in range(3)}) == 3
    with pytest.raises(ConfigError, match="holds no picture"):
        personalise.captioned(folders, ("x",), folders / "other")


def test_class_pictures_come_beside_ones_own_and_weigh_what_is_asked(folders, target_of):
    own = captioned_data(
        personalise.captioned(folders / "mine", ("mine",), folders / "run"), 2, SIDE, seed=0, threads=1
    )
    prior = captioned_data(folders / "class", 2, SIDE, seed=1, threads=1)
    batches = personalise.with_prior(own, prior, 0.25)
    iterator = iter(batches)
    first, position, second = next(iterator), json.loads(json.dumps(iterator.get_state())), next(iterator)
    assert first["text"] == ["mine", "mine", "a house", "a house"]
    np.testing.assert_array_equal(first["weight"], np.float32([1, 1, 0.25, 0.25]))
    again = iter(batches)
    again.set_state(position)
    np.testing.assert_array_equal(next(again)["image"], second["image"])
    target, _ = target_of("unet")
    batch = target.stage.prepare(first)
    loss = jax.jit(lambda b: target.stage.loss(target.params, b, keys())[0])
    each = [float(loss({**batch, "weight": np.eye(4, dtype=np.float32)[i]})) for i in range(4)]
    np.testing.assert_allclose(loss(batch), np.dot(each, [1, 1, 0.25, 0.25]), rtol=1e-5)


@pytest.mark.parametrize("rows", [(2, 2), (3, 3)])
def test_class_pictures_come_in_the_same_order_for_any_number_of_hosts(folders, rows):
    """Also where a host has an odd number of rows."""
    path = personalise.captioned(folders / "mine", ("mine",), folders / "run")
    own = captioned_data(path, rows[0], SIDE, seed=0, threads=1)
    prior = captioned_data(folders / "class", rows[1], SIDE, seed=1, threads=1)
    alone = iter(personalise.with_prior(own, prior, 0.25))
    hosts = [iter(personalise.with_prior(own, prior, 0.25, host_index=i, host_count=2)) for i in range(2)]
    plain = iter(own), iter(prior)
    for _ in range(3):
        batch, shares = next(alone), [next(host) for host in hosts]
        for name in ("image", "weight"):
            np.testing.assert_array_equal(np.concatenate([share[name] for share in shares]), batch[name])
        assert shares[0]["text"] + shares[1]["text"] == batch["text"]
        # Each as it would come by itself.
        np.testing.assert_array_equal(batch["image"], np.concatenate([next(it)["image"] for it in plain]))
    assert hosts[0].get_state() == hosts[1].get_state() == alone.get_state()


def test_hosts_that_make_one_captioned_folder_agree(folders):
    """At the same time, and of other pictures than those that an earlier run pointed at."""
    personalise.captioned(folders / "class", ("x",), folders / "run")
    with ThreadPoolExecutor(8) as pool:
        done = [pool.submit(personalise.captioned, folders / "mine", ("y",), folders / "run") for _ in range(32)]
        assert {future.result() for future in done} == {folders / "run"}
    assert sorted(p.name for p in (folders / "run").iterdir()) == ["metadata.jsonl", "pictures"]
    assert (folders / "run" / "pictures").resolve() == (folders / "mine").resolve()
    batch = next(iter(captioned_data(folders / "run", 3, SIDE, seed=0, threads=1)))
    assert batch["text"] == ["y"] * 3


def test_steering_pictures_of_the_metadata_are_cut_like_their_own(folders):
    folder = folders / "class"
    big = np.random.default_rng(0).integers(0, 255, (3 * SIDE, 2 * SIDE, 3), np.uint8)
    Image.fromarray(big).save(folder / "picture.png")
    Image.fromarray(255 - big).save(folder / "hint.png")
    line = {"file_name": "picture.png", "text": "a house", "conditioning_file": "hint.png"}
    (folder / "metadata.jsonl").write_text(json.dumps(line))
    batches = captioned_data(folder, 1, 2 * SIDE, seed=0, crop=SIDE, flip=True, threads=1)
    found = [batch for batch, _ in zip(iter(batches), range(6), strict=False)]
    for batch in found:
        np.testing.assert_array_equal(batch["hint"], 255 - batch["image"])
    assert len({batch["image"].tobytes() for batch in found}) > 3
    (folder / "metadata.jsonl").write_text(json.dumps({**line, "conditioning_file": "../hint.png"}))
    with pytest.raises(ConfigError, match="outside of the folder"):
        captioned_data(folder, 1, SIDE, seed=0)
    (folder / "metadata.jsonl").write_text(f'{json.dumps(line)}\n{{"file_name": "0.png", "text": "a house"}}')
    with pytest.raises(ConfigError, match="give one to all"):
        captioned_data(folder, 1, SIDE, seed=0)


# --- the configs


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "finetune").glob("*.py")), ids=lambda p: p.stem)
def test_every_config_is_one_of_a_target(path):
    assert ("clip", "vae", *TARGETS) == train.STAGES
    config = importlib.import_module(f"configs.finetune.{path.stem}").get_config()
    assert config.stage in TARGETS
    assert path.name in importlib.import_module(f"configs.finetune.{path.stem}").__doc__  # its command
    Options(**{name: config[name] for name in Options.__dataclass_fields__}).check(1)
    Noising(**{name: config[name] for name in Noising.__dataclass_fields__})
    check_read(config)
    assert config.eval.guidance_scale == 0  # sheets as the model itself recommends


# --- what is predicted


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
    with pytest.raises(OptionsError, match="zero_terminal_snr"):
        process(settings("unet", zero_terminal_snr=True), SCHEDULER)
    with pytest.raises(OptionsError, match="prediction_type 'x0'"):
        process(settings("unet", prediction_type="x0"), SCHEDULER)
    with pytest.raises(OptionsError, match="trainable"):
        make(settings("unet", trainable=("vae",)), tiny_model(), {})
