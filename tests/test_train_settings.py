"""What train.py makes of a config: settings reach what they are for, and one's own images are read as they should."""

import importlib
import json
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxdiff.config import ConfigError
from jaxdiff.data.captioned import captioned_data
from jaxdiff.io.edges import canny
from jaxdiff.io.modules import save_module
from jaxdiff.models.model import apply
from jaxdiff.training import dreambooth
from jaxdiff.training.checks import STAGES, check_settings
from jaxdiff.training.init import starting_model
from jaxdiff.training.options import NoiseOptions, Options
from jaxdiff.training.run import build_run
from jaxdiff.training.stages import vae_stage
from jaxdiff.training.trainables import TRAINABLES, make
from tests.support.processes import ROOT
from tests.support.stages import keys, random_images, settings
from tests.support.tiny import LATENT, MAX_LENGTH, SIDE, UNET


@pytest.fixture
def folders(tmp_path):
    """A folder of three images without captions, and a captioned one of four others."""
    for name, count in (("mine", 3), ("class", 4)):
        (tmp_path / name).mkdir()
        for i in range(count):
            Image.fromarray(random_images(1, seed=i)[0]).save(tmp_path / name / f"{i}.png")
    lines = [json.dumps({"file_name": f"{i}.png", "text": "a house"}) for i in range(4)]
    (tmp_path / "class" / "metadata.jsonl").write_text("\n".join(lines))
    return tmp_path


@pytest.fixture
def run_of(folders, tiny_folder):
    """The run of train.py with these settings, of the class images."""

    def make_run(stage, **changes):
        config = settings(stage, **{"batch_size": 4 * jax.device_count(), **changes})
        config.init_from.model = str(tiny_folder)
        config.data.update({"path": str(folders / "class"), "image_size": SIDE, "threads": 1})
        return build_run(config, folders / "run")

    return make_run


# --- the configs


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "finetune").glob("*.py")), ids=lambda p: p.stem)
def test_every_config_is_one_of_a_target(path):
    assert {*TRAINABLES, "super_resolution"} == set(STAGES)  # which trains no model that draws from text
    config = importlib.import_module(f"configs.finetune.{path.stem}").get_config()
    assert config.stage in TRAINABLES
    assert path.name in importlib.import_module(f"configs.finetune.{path.stem}").__doc__  # its command
    Options.from_config(config).check(1)
    NoiseOptions.from_config(config)
    check_settings(config)
    assert config.eval.guidance_scale == 0  # sheets as the model itself recommends


# --- settings of train.py reach what they are for


def test_the_weight_of_class_images(run_of, folders):
    batches = run_of("unet", prior_preservation={"path": str(folders / "class"), "weight": 0.5}).batches()
    weights = next(iter(batches))["weight"]
    np.testing.assert_array_equal(weights, np.repeat(np.float32([1, 0.5]), len(weights) // 2))


def test_edges_are_found_where_images_are_decoded(run_of):
    for high, colours in ((200.0, {0, 255}), (2040.0, {0})):  # which no edge reaches
        run = run_of("controlnet", controlnet={"canny_high": high}, data={"flip": True})
        stage, batch = run.trainable.stage, next(iter(run.batches()))
        edges = [canny(image, 100.0, high) for image in batch["image"]]
        np.testing.assert_array_equal(batch["hint"], edges)
        assert set(np.unique(batch["hint"])) == colours
        np.testing.assert_array_equal(stage.prepare({**batch, "hint": batch["image"]})["hint"], batch["image"])
        del batch["hint"]  # of data that come from elsewhere
        np.testing.assert_array_equal(stage.prepare(batch)["hint"], edges)


@pytest.mark.slow
def test_weights_of_the_autoencoders_losses(run_of):
    run = run_of("vae", kl_weight=2.0, edge_weight=0.0, eval={"images": 2})
    stage, params = run.trainable.stage, run.trainable.params
    batch = stage.prepare(next(iter(run.batches())))
    args = params, batch, keys(len(batch["image"]))
    value, metrics = jax.jit(stage.loss)(*args)
    np.testing.assert_allclose(value, metrics["reconstruction"] + 2 * metrics["kl"], rtol=1e-5)
    _, with_edges = jax.jit(vae_stage(run_of("vae").trainable.model, edge_weight=1.0).loss)(*args)
    assert with_edges["reconstruction"] > metrics["reconstruction"]
    np.testing.assert_allclose(with_edges["kl"], metrics["kl"], rtol=1e-5)


@pytest.mark.parametrize("remat", ["", "full"])
def test_activations_are_computed_again_in_the_unet(run_of, tiny, remat):
    model = run_of("unet", remat=remat).trainable.model
    inputs = jnp.zeros((1, *LATENT)), jnp.zeros(1), jnp.zeros((1, MAX_LENGTH, UNET.cross_attention_dim))
    program = jax.make_jaxpr(lambda params: apply(model, params, "unet", *inputs))(tiny[1])
    assert ("checkpoint" in str(program) or "remat" in str(program)) == bool(remat)


@pytest.mark.parametrize(("count", "sizes"), [(3, [2, 1]), (9, [2, 2])])
def test_a_device_is_given_no_more_images_than_in_a_step(run_of, count, sizes):
    held_out = run_of("unet", accumulate=2, eval={"images": count}).data.held_out()
    assert [len(b["image"]) for b in held_out] == [len(b["text"]) for b in held_out] == sizes


# --- one's own images


def test_images_without_captions_get_those_of_the_config(folders):
    for _ in range(2):  # a second run finds the first one's folder
        path = dreambooth.write_captioned(folders / "mine", ("a photo of <cat>", "<cat>"), folders / "run")
    batches = iter(captioned_data(path, 3, SIDE, seed=0, threads=1))
    found = [next(batches) for _ in range(4)]
    assert {t for b in found for t in b["text"]} == {"a photo of <cat>", "<cat>"}
    assert len({b["image"][i].tobytes() for b in found for i in range(3)}) == 3
    with pytest.raises(ConfigError, match="holds no image"):
        dreambooth.write_captioned(folders, ("x",), folders / "other")


def test_class_images_come_beside_ones_own_and_weigh_what_is_asked(folders, tiny):
    own = captioned_data(
        dreambooth.write_captioned(folders / "mine", ("mine",), folders / "run"), 2, SIDE, seed=0, threads=1
    )
    prior = captioned_data(folders / "class", 2, SIDE, seed=1, threads=1)
    batches = dreambooth.with_prior(own, prior, 0.25)
    iterator = iter(batches)
    first, position, second = next(iterator), json.loads(json.dumps(iterator.get_state())), next(iterator)
    assert first["text"] == ["mine", "mine", "a house", "a house"]
    np.testing.assert_array_equal(first["weight"], np.float32([1, 1, 0.25, 0.25]))
    again = iter(batches)
    again.set_state(position)
    np.testing.assert_array_equal(next(again)["image"], second["image"])
    target = make(settings("unet"), *tiny)
    batch = target.stage.prepare(first)
    loss = jax.jit(lambda b: target.stage.loss(target.params, b, keys())[0])
    each = [float(loss({**batch, "weight": np.eye(4, dtype=np.float32)[i]})) for i in range(4)]
    np.testing.assert_allclose(loss(batch), np.dot(each, [1, 1, 0.25, 0.25]), rtol=1e-5)


@pytest.mark.parametrize("rows", [(2, 2), (3, 3)])
def test_class_images_come_in_the_same_order_for_any_number_of_hosts(folders, rows):
    """Also where a host has an odd number of rows."""
    path = dreambooth.write_captioned(folders / "mine", ("mine",), folders / "run")
    own = captioned_data(path, rows[0], SIDE, seed=0, threads=1)
    prior = captioned_data(folders / "class", rows[1], SIDE, seed=1, threads=1)
    alone = iter(dreambooth.with_prior(own, prior, 0.25))
    hosts = [iter(dreambooth.with_prior(own, prior, 0.25, host_index=i, host_count=2)) for i in range(2)]
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
    """At the same time, and of other images than those that an earlier run pointed at."""
    dreambooth.write_captioned(folders / "class", ("x",), folders / "run")
    with ThreadPoolExecutor(8) as pool:
        done = [pool.submit(dreambooth.write_captioned, folders / "mine", ("y",), folders / "run") for _ in range(32)]
        assert {future.result() for future in done} == {folders / "run"}
    assert sorted(p.name for p in (folders / "run").iterdir()) == ["metadata.jsonl", "pictures"]
    assert (folders / "run" / "pictures").resolve() == (folders / "mine").resolve()
    batch = next(iter(captioned_data(folders / "run", 3, SIDE, seed=0, threads=1)))
    assert batch["text"] == ["y"] * 3


def test_steering_images_of_the_metadata_are_cut_like_their_own(folders):
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


@pytest.mark.slow
def test_an_autoencoder_may_come_from_a_folder_of_its_own(tiny, tmp_path):
    model, params = tiny
    save_module(tmp_path / "vae", model.vae, params["vae"])
    sizes = {"text_encoder": model.text_encoder.config.to_dict(), "unet": model.unet.config.to_dict()}
    made, own = starting_model(sizes, {"vae": str(tmp_path / "vae")}, lambda: model.tokenizer, jax.random.key(0))
    assert made.vae.config == model.vae.config
    jax.tree.map(np.testing.assert_array_equal, own["vae"], jax.device_get(params["vae"]))
    with pytest.raises(ConfigError, match=r"init_from.unet: .*describes a AutoencoderKL, but UNet2DConditionModel"):
        starting_model(sizes, {"unet": str(tmp_path / "vae")}, lambda: model.tokenizer, jax.random.key(0))
