"""What AUTOMATIC1111's images say of how they were drawn, as flags."""

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from jaxdiff.cli.errors import UsageError
from jaxdiff.cli.flags import parse
from jaxdiff.io.images import write_png
from jaxdiff.text.infotext import SAMPLERS, read_infotext

HIRES = """a castle, (red:1.2) roof,
at night <lora:detail:0.7>
Negative prompt: blurry,
low quality
Steps: 30, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 6.5, Seed: 123, Size: 512x768, Model hash: 6ce0161689, \
Model: v1-5-pruned, Denoising strength: 0.45, Clip skip: 2, Hires upscale: 1.5, Hires upscaler: Latent, \
Lora hashes: "detail: 7c6bad76eb54, ink: 12", Version: v1.10.1"""


def test_a_text_of_two_passes():
    flags, others = read_infotext(HIRES)
    assert flags == {
        "prompt": ["a castle, (red:1.2) roof,\nat night <lora:detail:0.7>"], "negative_prompt": "blurry,\nlow quality",
        "steps": 30, "scheduler": "dpmpp_2m", "spacing": "karras", "guidance_scale": 6.5, "seed": 123,
        "width": 768, "height": 1152, "hires": 1.5, "hires_strength": 0.45, "hires_upscale": "latent", "clip_skip": 1,
    }  # fmt: skip
    assert others == ["Model: v1-5-pruned"]


@pytest.mark.parametrize(
    ("last", "flags", "others"),
    [
        ("Steps: 20, Sampler: DPM++ 2M Karras, Seed: 1",
         {"steps": 20, "scheduler": "dpmpp_2m", "spacing": "karras", "seed": 1}, []),
        ("Steps: 20, Sampler: Euler a, Schedule type: Automatic, Seed: 1",
         {"steps": 20, "scheduler": "euler_ancestral", "seed": 1}, []),
        ("Steps: 20, Seed: 1, Hires upscale: many", {"steps": 20, "seed": 1}, []),
        ("Steps: 20, Sampler: Restart, Seed: 1", {"steps": 20, "seed": 1}, ["Sampler: Restart"]),
        ("Steps: 20, Seed: 1, Denoising strength: 0.7", {"steps": 20, "seed": 1}, ["Denoising strength: 0.7"]),
        ("Steps: x, Seed: 1, Size: 512", {"seed": 1}, ["Steps: x", "Size: 512"]),
        ("Seed: 1, Variation seed: 7, Variation seed strength: 0.2",
         {"seed": 1, "variation_seed": 7, "variation_strength": 0.2}, []),
        ('Steps: 20, Seed: 1, ControlNet 0: "Module: canny, Weight: 1"', {"steps": 20, "seed": 1},
         ['ControlNet 0: "Module: canny, Weight: 1"']),
    ],
)  # fmt: skip
def test_settings(last, flags, others):
    assert read_infotext(f"a cat\n{last}") == ({"prompt": ["a cat"], **flags}, others)


@pytest.mark.parametrize("text", ["", "a cat", "a cat\nsizes: big, colours: red", "Negative prompt: dog"])
def test_texts_without_settings(text):
    assert read_infotext(text) == ({}, [])


def test_a_long_text_is_read_in_no_time():
    """A reader that tried every end of every name would take minutes."""
    assert read_infotext(f"a cat\n{'a ' * 500_000}") == ({}, [])


def test_every_sampler_is_a_scheduler_here():
    import jaxdiff

    assert set(SAMPLERS.values()) <= set(jaxdiff.SCHEDULERS)


def image(path, text: str):
    info = PngInfo()
    info.add_text("parameters", text)
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    return path


def test_a_png_of_the_web_ui_gives_its_flags(tmp_path, caplog):
    path = image(tmp_path / "a.png", HIRES)
    f = parse(["sample.py", f"--from_png={path}", "--steps=12", "--hires_strength=0.5"])
    assert (f.prompt, f.negative_prompt) == (read_infotext(HIRES)[0]["prompt"], "blurry,\nlow quality")
    assert (f.steps, f.scheduler, f.spacing, f.seed, f.clip_skip) == (12, "dpmpp_2m", "karras", 123, 1)
    assert (f.width, f.height, f.hires, f.hires_strength, f.hires_upscale) == (768, 1152, 1.5, 0.5, "latent")
    assert "the image will differ. Not followed: Model: v1-5-pruned" in caplog.text


def test_one_s_own_flags_come_before_the_text_for_people(tmp_path, caplog):
    path = write_png(tmp_path / "a.png", np.zeros((8, 8, 3), np.uint8), {"prompt": "a dog", "steps": 3, "seed": 4})
    f = parse(["sample.py", f"--from_png={path}"])
    assert (f.prompt, f.steps) == (["a dog"], 3)
    assert "AUTOMATIC1111" not in caplog.text


def test_a_png_that_says_nothing(tmp_path):
    for text in ("", "made by hand"):
        with pytest.raises(
            UsageError, match=r"^--from_png: .* say how it was drawn: give a PNG as sample\.py or AUTOMATIC1111"
        ):
            parse(["sample.py", f"--from_png={image(tmp_path / 'a.png', text)}"])
