"""sample.py's flags beyond the plain prompt: where prompts come from, and every task by flags."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import jaxdiff
from jaxdiff.cli import sample
from jaxdiff.cli.flags import parse, parse_embedding
from jaxdiff.cli.requests import batch_arguments, count_images, image_requests, prompt_lines, sheet_columns
from jaxdiff.config import TinyVAEConfig
from jaxdiff.errors import say_once
from jaxdiff.io.controlnet import save_controlnet
from jaxdiff.io.images import extend, read_image, read_metadata, write_gif, write_png
from jaxdiff.io.lora import init_lora
from jaxdiff.io.modules import save_module
from jaxdiff.models.tiny_vae import AutoencoderTiny
from jaxdiff.sampling.checks import as_mask
from tests.support.commands import CASTLE, STEPS
from tests.support.tiny import LATENT, SIDE, tiny_controlnet
from tests.support.written import existing


def planned(*args):
    f = parse(["sample.py", *args])
    return image_requests(f, prompt_lines(f))


def test_prompts_of_flags_and_files_in_order(tmp_path):
    lines = '{"prompt": "b", "negative_prompt": "n", "seed": 50}', '{"prompt": "c", "negative_prompt": ""}'
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    flags = ("--num_images=2", "--negative_prompt=x", "--seed=3")
    images = planned("--prompt=a", f"--prompts_file={tmp_path}/p.jsonl", *flags)
    drawn = [(p["prompt"], p["negative_prompt"], p["seed"]) for p in images]
    assert drawn == [("a", "x", 3), ("a", "x", 4), ("b", "n", 50), ("b", "n", 51), ("c", "", 7), ("c", "", 8)]


def test_a_matrix_is_expanded_and_its_flag_is_not_needed_to_draw_one_of_it_again(tmp_path):
    (tmp_path / "colour.txt").write_text("red\nblue\n")
    images = planned("--prompt={a|the} __colour__ cat", "--matrix", f"--wildcards={tmp_path}")
    assert [p["prompt"] for p in images] == ["a red cat", "a blue cat", "the red cat", "the blue cat"]
    assert not {"matrix", "wildcards"} & set(images[0])
    (one,) = planned("--prompt=a __colour__ cat", f"--wildcards={tmp_path}", "--seed=1")
    assert one["prompt"] in ("a red cat", "a blue cat")
    (plain,) = planned("--prompt={a|the} __colour__ cat")
    assert plain["prompt"] == "{a|the} __colour__ cat"


def test_wildcards_are_drawn_for_each_image_by_its_seed(tmp_path):
    colours = [f"colour {i}" for i in range(100)]
    (tmp_path / "colour.txt").write_text("\n".join(colours))
    flags = (f"--wildcards={tmp_path}", "--prompt={a|the} __colour__ cat")
    images = planned(*flags, "--num_images=4", "--seed=3")
    assert [p["seed"] for p in images] == list(range(3, 11))
    assert [p["prompt"].split()[0] for p in images] == ["a"] * 4 + ["the"] * 4
    drawn = [p["prompt"].split(" ", 1)[1] for p in images]
    assert len(set(drawn)) > 4  # 8 of 100, each a draw of its own
    assert planned(*flags, "--num_images=4", "--seed=3") == images
    assert planned(*flags, "--seed=5")[0] == images[2]
    given = {name: value for name, value in images[6].items() if value is not None}  # the steps are the model's own
    (again,) = planned(*(f"--{name}={value}" for name, value in given.items()))
    assert again == images[6]


def test_what_the_second_encoder_is_to_steer_away_from():
    (image,) = planned("--prompt=a", "--negative_prompt=b", "--prompt_2=c", "--negative_prompt_2=d")
    told = batch_arguments([image])
    assert (told["prompts_2"], told["negative_prompts"], told["negative_prompts_2"]) == (["c"], ["b"], ["d"])


def test_names_of_embeddings_and_paths_with_an_equals_sign(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=1.safetensors").touch()
    assert parse_embedding("t.safetensors") == ("t.safetensors", None)
    assert parse_embedding("runs/lr=1e-4/t.safetensors") == ("runs/lr=1e-4/t.safetensors", None)
    assert parse_embedding("lr=1.safetensors") == ("lr=1.safetensors", None)
    assert parse_embedding("<x>=runs/lr=1e-4/t.safetensors") == ("runs/lr=1e-4/t.safetensors", "<x>")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--prompt={a|b} {1|2|3} cat", "--matrix"), 3),
        (("--prompt=a cat", "--matrix"), 1),
        (("--prompt=a", "--num_images=5"), 5),
        (("--prompt=a", "--prompt=b", "--prompt=c"), 2),
    ],
)
def test_columns_of_the_sheet(flags, expected):
    f = parse(["sample.py", *flags])
    assert sheet_columns(f, len(image_requests(f, prompt_lines(f)))) == expected


def test_a_style_goes_around_prompt_and_negative_prompt(tmp_path):
    styles = {"blue": {"prompt": "{prompt} in blue", "negative_prompt": "red"}}
    (tmp_path / "s.json").write_text(json.dumps(styles))
    (image,) = planned("--prompt=a cat", "--negative_prompt=dog", "--style=blue", f"--styles_file={tmp_path}/s.json")
    assert (image["prompt"], image["negative_prompt"]) == ("a cat in blue", "dog, red")
    assert "style" not in image


def test_an_animation_of_two_prompts_and_of_one(tmp_path):
    frames = planned("--prompt=a", "--prompt=b", "--interpolate=4", "--seed=7")
    assert [f["blend"] for f in frames] == [f["variation_strength"] for f in frames] == [0, 0.25, 0.5, 0.75, 0]
    ends = [(f["prompt"], f["blend_prompt"], f["seed"], f["variation_seed"]) for f in frames]
    assert ends == [("a", "b", 7, 8)] * 4 + [("b", "b", 8, 8)]  # in the end, the second image itself
    assert "blend_negative_prompt" not in frames[0]
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "negative_prompt": "n"}\n')
    frames = planned(f"--prompts_file={tmp_path}/p.jsonl", "--interpolate=2")
    negatives = [(f.get("negative_prompt"), f["blend_negative_prompt"]) for f in frames]
    assert negatives == [(None, "n")] * 2 + [("n", "n")]
    assert batch_arguments(frames[:2])["blend_negative_prompts"] == ["n", "n"]
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "negative_prompt": "n"}\n{"prompt": "b"}\n')
    frames = planned(f"--prompts_file={tmp_path}/p.jsonl", "--interpolate=2")
    assert [f["blend_negative_prompt"] for f in frames] == ["", "", ""]
    frames = planned("--prompt=a", "--interpolate=2", "--seed=7")
    assert [(f["prompt"], f["blend_prompt"], f["variation_seed"]) for f in frames] == [("a", "a", 8)] * 3
    assert frames[-1]["seed"] == 8


def test_only_what_differs_from_the_defaults_is_kept():
    (image,) = planned("--prompt=a")
    assert set(image) == {"prompt", "seed", "model", "dtype"}
    (image,) = planned("--prompt=a", "--noemphasis", "--hires=2", "--variation_seed=0", "--clip_skip=1")
    assert (image["hires_strength"], image["variation_strength"], image["clip_skip"]) == (0.6, 0.1, 1)


def test_zero_and_off_are_said_to_generate():
    (image,) = planned("--prompt=a", "--noemphasis", "--variation_seed=0", "--guidance_scale=0", "--noise_level=0")
    told = batch_arguments([image])
    assert told["emphasis"] is False
    assert (told["variation_seed"], told["guidance_scale"], told["noise_level"]) == ([0], [0.0], [0])
    (image,) = planned("--prompt=a", "--variation_seed=3", "--variation_strength=0")
    assert batch_arguments([image])["variation_strength"] == [0.0]


@pytest.mark.parametrize("more", [(), ("--interpolate=4",), ("--prompt=b", "--num_images=3", "--interpolate=2")])
def test_the_images_are_counted_before_they_are_planned(more):
    f = parse(["sample.py", "--prompt=a", *more])
    assert count_images(f, prompt_lines(f)) == len(image_requests(f, prompt_lines(f)))


IMAGE = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


@pytest.mark.slow
def test_a_mask_is_drawn_and_the_rest_kept(sample_cli):
    write_png("start.png", IMAGE)
    mask = np.zeros((SIDE, SIDE, 3), np.uint8)
    mask[:, SIDE // 2 :] = 255
    write_png("mask.png", mask)
    flags = (CASTLE, STEPS, "--image=start.png", "--mask=mask.png", "--output=out.png")
    code, out, err = sample_cli(*flags)
    assert (code, out, err) == (0, ["out.png"], "")
    kept = read_metadata("out.png")
    assert (kept["mask"], kept["strength"]) == ("mask.png", 1.0)
    first = read_image("out.png")
    assert sample_cli(*flags, "--seed=1", "--overwrite")[0] == 0
    second = read_image("out.png")
    assert (first[:, -2:] != second[:, -2:]).any()  # drawn from another seed
    change = np.abs(first.astype(int) - second).mean((0, 2))
    assert change[:4].mean() < change[-4:].mean() / 2  # kept, but for what the autoencoder lets through


@pytest.mark.parametrize("kind", ["RGBA.png", "LA.png", "P.png", "RGBA.gif", "RGBA.webp", "RGBA.tiff"])
def test_what_is_transparent_in_a_mask_is_kept(kind, tiny, tmp_path):
    """White paint on the left of a clear layer: only that is redrawn."""
    mode, end = kind.split(".")
    layer = np.full((SIDE, SIDE, 4), 255, np.uint8)
    layer[:, SIDE // 2 :, 3] = 0
    path, image = tmp_path / f"mask.{end}", Image.fromarray(layer)
    image = image.quantize(method=Image.Quantize.FASTOCTREE) if mode == "P" else image.convert(mode)
    image.save(path, **({"lossless": True} if end == "webp" else {}))
    write_png(tmp_path / "a.png", IMAGE)
    f = parse(["sample.py", CASTLE, f"--image={tmp_path}/a.png", f"--mask={path}", "--height=16", "--width=16"])
    mask = sample.input_images(f, tiny[0], read_image)["mask"]
    assert mask[:, : SIDE // 2].all()
    assert not mask[:, SIDE // 2 :].any()


def test_what_is_transparent_of_a_control_image_is_black(tiny, tmp_path):
    """A white pose on a clear layer; a photograph whose edges are found lies on white, as everywhere."""
    layer = np.full((SIDE, SIDE, 4), 255, np.uint8)
    layer[:, SIDE // 2 :, 3] = 0
    Image.fromarray(layer).save(tmp_path / "pose.png")
    beside = [f"--control_image={tmp_path}/pose.png", "--height=16", "--width=16"]
    given = {edges: parse(["sample.py", CASTLE, *beside, f"--control_edges={edges}"]) for edges in (True, False)}
    (hint,) = sample.input_images(given[False], tiny[0], read_image)["control_images"]
    assert (hint[:, : SIDE // 2] == 255).all()
    assert not hint[:, SIDE // 2 :].any()
    (hint,) = sample.input_images(given[True], tiny[0], read_image)["control_images"]
    assert not hint.any()


def test_a_mask_without_white_is_said(caplog):
    say_once.cache_clear()
    assert not as_mask(np.zeros((4, 4), np.uint8), 1, (4, 4)).any()
    assert "The mask is nowhere white: nothing of the image is redrawn" in caplog.text


def test_an_image_that_was_not_fetched_names_its_flag(sample_cli):
    Path("a.png").write_text("version https://git-lfs.github.com/spec/v1\n")
    code, _, err = sample_cli(CASTLE, STEPS, "--image=a.png")
    assert code == 2
    assert (
        "error: --image: a.png cannot be read as an image (it is a Git LFS pointer, not the file itself: fetch" in err
    )


def test_a_mask_of_another_size(sample_cli):
    write_png("start.png", IMAGE)
    write_png("mask.png", IMAGE[:-2])
    code, out, err = sample_cli(CASTLE, STEPS, "--image=start.png", "--mask=mask.png")
    assert (code, out) == (2, [])
    assert f"--image and --mask are {SIDE} x {SIDE} and {SIDE} x {SIDE - 2}: make the mask as large" in err


@pytest.mark.slow
def test_outpainting_makes_the_image_larger(sample_cli):
    write_png("start.png", IMAGE)
    code, out, err = sample_cli(CASTLE, STEPS, "--image=start.png", "--outpaint=0,0,8,4", "--output=out.png")
    assert (code, out, err) == (0, ["out.png"], "")
    assert read_image("out.png").shape == (SIDE + 4, SIDE + 8, 3)


def test_the_canvas_and_its_mask():
    canvas, mask = extend(IMAGE, 0, 3, 0, 0)
    np.testing.assert_array_equal(canvas[3:], IMAGE)
    np.testing.assert_array_equal(canvas[:3], IMAGE[2::-1])
    assert mask[: 3 + 8].all()
    assert not mask[3 + 8 :].any()


@pytest.mark.slow
def test_two_stages_variations_and_animations(sample_cli):
    write_png("start.png", IMAGE)
    write_png("mask.png", IMAGE // 128 * 255)
    given = ("--hires=2", "--tile=8", "--variation_seed=4", "--image=start.png", "--mask=mask.png")
    code, out, err = sample_cli(CASTLE, STEPS, *given, "--output=hires.png")
    assert (code, out, err) == (0, ["hires.png"], "")
    again = [f"--{name}={value}" for name, value in read_metadata("hires.png").items()]
    assert sample_cli(*again, "--output=again.png")[0] == 0
    assert Path("again.png").read_bytes() == Path("hires.png").read_bytes()
    code, out, err = sample_cli(CASTLE, "--prompt=a red dragon", STEPS, "--interpolate=2", "--output=f/")
    assert (code, err) == (0, "")
    frames = ["a-castle-000-000.png", "a-castle-000-001.png", "a-red-dragon-001-002.png"]
    assert [Path(p).name for p in out] == [*frames, "animation.gif"]
    again = [f"--{name}={value}" for name, value in read_metadata(out[1]).items()]  # between the two prompts
    assert sample_cli(*again, "--output=frame.png")[0] == 0
    assert Path("frame.png").read_bytes() == Path(out[1]).read_bytes()
    with Image.open("f/animation.gif") as animation:
        assert (animation.n_frames, animation.info["duration"], animation.size) == (3, 100, (SIDE, SIDE))


def test_an_animation_that_cannot_be_written_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"no/animation.gif cannot be written"):
        write_gif(tmp_path / "no/animation.gif", [IMAGE], 0.1)
    assert existing(tmp_path) == []


@pytest.mark.slow
def test_what_is_laid_onto_a_model(sample_cli, tiny, tmp_path):
    """A LoRA, an autoencoder, a ControlNet on edges and a tiny autoencoder for the strip, each of which shows."""
    model, params = tiny
    lora = init_lora(model, params, 2, 2.0, key=jax.random.key(0))
    lora = jax.tree.map(lambda x: x + 0.5, lora)
    jaxdiff.save_lora("style.safetensors", model, lora)
    save_controlnet("net", *tiny_controlnet(model))
    small = AutoencoderTiny(
        TinyVAEConfig(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
                      num_decoder_blocks=(1, 1), latent_channels=LATENT[-1])
    )  # fmt: skip
    save_module("taesd", small, small.init(jax.random.key(0), IMAGE[None] / 255.0)["params"])
    write_png("hint.png", IMAGE)
    plain = sample_cli(CASTLE, STEPS, "--output=plain.png")
    more = {
        "lora": ("--lora=style.safetensors:0.5",),
        "net": ("--controlnet=net", "--control_image=hint.png", "--controlnet_scale=0.7", "--control_edges"),
        "vae": ("--vae=taesd",),
        "strip": ("--preview", "--preview_vae=taesd"),
    }
    assert plain[0] == 0
    for name, flags in more.items():
        code, _, err = sample_cli(CASTLE, STEPS, *flags, f"--output={name}.png")
        assert (code, err) == (0, "")
        same = (read_image(f"{name}.png") == read_image("plain.png")).all()
        assert same == (name == "strip")
    assert read_metadata("net.png")["controlnet"] == ["net"]
    assert read_metadata("vae.png")["vae"] == "taesd"


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ([CASTLE, "--mask=m.png"], "--mask goes with --image"),
        ([CASTLE, "--outpaint=1,1,1,1"], "--outpaint goes with --image"),
        ([CASTLE, "--image=a.png", "--outpaint=1,1"], "--outpaint 1,1 must be 4 numbers"),
        ([CASTLE, "--image=a.png", "--outpaint=1,1,1,-1"], "none below 0"),
        ([CASTLE, "--image=a.png", "--outpaint=1,1,1,x"], "must be 4 numbers"),
        ([CASTLE, "--guidance_interval=1"], "--guidance_interval 1 must be 2 numbers"),
        ([CASTLE, "--guidance_interval=0.1,nan"], "must be 2 numbers"),
        (
            [CASTLE, "--guidance_interval=5,1"],
            "--guidance_interval (5.0, 1.0) must be two noise levels, the lower one first",
        ),
        ([CASTLE, "--controlnet=a"], "--controlnet goes with --control_image"),
        ([CASTLE, "--controlnet=a", "--control_image=a", "--control_image=b"], "1 --controlnet and 2 --control_image"),
        ([CASTLE, "--hires=nan"], "--hires nan"),
        ([CASTLE, "--hires=2", "--hires_strength=0.1", STEPS], "--hires_strength 0.1 must be in (0, 1] and leave"),
        ([CASTLE, "--hires=2", "--hires_strength=nan"], "--hires_strength nan must be finite"),
        ([CASTLE, "--control_image=a", "--controlnet_scale=inf"], "--controlnet_scale [inf] must be finite"),
        ([CASTLE, "--hires_strength=0.5"], "--hires_strength goes with --hires"),
        ([CASTLE, "--hires_upscale=latent"], "--hires_upscale goes with --hires"),
        ([CASTLE, "--variation_strength=0.5"], "--variation_strength goes with --variation_seed"),
        ([CASTLE, "--negative_prompt_2=a"], "--negative_prompt_2 goes with --negative_prompt"),
        ([CASTLE, "--interpolate=1"], "--interpolate=1"),
        ([CASTLE, "--interpolate=3", "--blend_prompt=a dog"], "leave --blend_prompt out"),
        ([CASTLE, "--blend=0.3"], "--blend goes with --blend_prompt"),
        ([CASTLE, "--interpolate=3", "--variation_seed=1"], "--interpolate sets --variation_seed itself"),
        ([CASTLE, "--style=nope"], "The style 'nope' is unknown; known are"),
        ([CASTLE, "--styles_file=x.json"], "--styles_file goes with --style"),
        (["--prompts_file=none.txt"], "The prompts file none.txt does not exist"),
        (["--prompt={a|b", "--matrix"], "The prompt has a { that is not closed"),
        ([CASTLE, "--preview_vae=x"], "--preview_vae goes with --preview"),
    ],
)
def test_flags_that_do_not_go_together(flags, sentence, sample_cli):
    code, out, err = sample_cli(*flags)
    assert (code, out) == (2, [])
    assert sentence in err
    assert err.count("\n") == 1
    assert existing() == []


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--lora=none.safetensors"], "--lora: none.safetensors does not exist: check the path"),
        (["--embedding=<x>=none.safetensors"], "--embedding: none.safetensors does not exist: check the path"),
        (["--controlnet=none", "--control_image=hint.png"], "--controlnet: none does not exist: check the path"),
        (["--image=none.png"], "--image: none.png does not exist: check the path"),
        (["--vae=none"], "--vae: none does not exist: check the path"),
    ],
)
def test_files_that_are_not_there(flags, sentence, sample_cli):
    write_png("hint.png", IMAGE)
    code, out, err = sample_cli(CASTLE, *flags)
    assert (code, out) == (2, [])
    assert sentence in err
    assert err.count("\n") == 1


def test_a_control_image_for_a_model_without_controlnets(sample_cli):
    write_png("hint.png", IMAGE)
    code, out, err = sample_cli(CASTLE, "--control_image=hint.png")
    assert (code, out) == (2, [])
    assert "--control_image are for ControlNets, and this model has none" in err


def test_an_empty_line_in_a_prompts_file_is_named(sample_cli):
    Path("p.txt").write_text("a castle\n\na dog\n")
    code, out, err = sample_cli("--prompts_file=p.txt")
    assert (code, out) == (2, [])
    assert "Line 2 of p.txt is empty" in err
