"""Files that sample.py writes and reads: nothing is lost, paths mean what they say, LoRAs are found by name."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxdiff
from jaxdiff.cli import flags, sample
from jaxdiff.cli.errors import UsageError
from jaxdiff.evaluation.flags import parse as parse_evaluation
from jaxdiff.io.images import read_image, read_metadata, write_gif, write_png
from jaxdiff.io.lora import init_lora, merge_lora, read_lora
from jaxdiff.sampling.generate import Drawn
from jaxdiff.text.prompt_files import PromptError, read_prompts
from tests.support.commands import CASTLE
from tests.support.written import existing

LONG = "masterpiece, best quality, very detailed, absurdres, a "


@pytest.fixture
def planes(monkeypatch):
    """Draws planes in place of images, as many as there are calls; their parameters."""
    seen = []

    def draw(model, params, request, lookup):
        seen.append(params)
        count = len(request.prompts)
        frames = np.zeros((count, 2, 4, 4, 3), np.uint8) if request.settings.call.preview_steps is not None else None
        return Drawn(np.full((count, 4, 4, 3), len(seen), np.uint8), np.ones(count, bool), frames)

    monkeypatch.setattr(sample, "draw", draw)
    return seen


@pytest.mark.parametrize("linked", [True, False])
def test_nothing_that_exists_is_overwritten(linked, sample_cli, planes, monkeypatch):
    def no_links(*args):
        raise OSError(1, "Operation not permitted")

    if not linked:
        monkeypatch.setattr(os, "link", no_links)
    more = ("--grid", "--preview", "--interpolate=2")
    for output in ("o", "o/x.png", "{seed}-{index}.png"):
        code, first, err = sample_cli(f"--prompt={LONG}castle", f"--output={output}", *more)
        assert (code, err) == (0, "")
        before = {path: Path(path).read_bytes() for path in first}
        code, second, err = sample_cli(f"--prompt={LONG}dragon", f"--output={output}", *more)
        assert code == 0
        assert f"{first[0]} exists, so this image is {second[0]}" in err
        assert len(set(first + second)) == len(first) + len(second) == 2 * (2 * 3 + 2)
        assert {path: Path(path).read_bytes() for path in first} == before
        for path, strip in zip(second[:-2:2], second[1:-2:2], strict=True):
            assert Path(strip).name == f"{Path(path).stem}-preview.png"
    assert sum(name.endswith(".gif") for name in existing()) == 6
    code, third, err = sample_cli(f"--prompt={LONG}castle", f"--output={output}", *more, "--overwrite")
    assert (code, third, err) == (0, first, "")
    assert read_image(first[0])[0, 0, 0] == len(planes)


def test_a_file_given_by_name_is_numbered(sample_cli, planes):
    names = [sample_cli(CASTLE, "--output=a.png")[1] for _ in range(3)]
    assert names == [["a.png"], ["a-2.png"], ["a-3.png"]]
    assert "overwrite" not in read_metadata("a-3.png")


def test_two_runs_may_write_into_one_folder(tmp_path):
    def run(mark: int) -> list[Path]:
        image = np.full((2, 2, 3), mark, np.uint8)
        return [write_png(tmp_path / "a.png", image, overwrite=False) for _ in range(20)]

    with ThreadPoolExecutor(2) as pool:
        for mark, paths in zip((1, 2), pool.map(run, (1, 2)), strict=True):
            assert {read_image(path)[0, 0, 0] for path in paths} == {mark}
    assert len(existing(tmp_path)) == 40


def test_a_failure_takes_no_name(tmp_path):
    with pytest.raises(Exception, match="0 to 1"):
        write_png(tmp_path / "a.png", np.full((2, 2, 3), 7.0), overwrite=False)
    assert existing(tmp_path) == []
    assert write_gif(tmp_path / "a.gif", [np.zeros((2, 2, 3))], 0.1, overwrite=False) == tmp_path / "a.gif"


# Paths.


def test_home_is_where_the_user_is(sample_cli, planes, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert sample_cli(CASTLE, "--output=~/x.png")[1] == [f"{tmp_path}/home/x.png"]
    assert not Path("~").exists()
    f = flags.parse(["sample.py", CASTLE, "--lora=~/a.safetensors:0.5", "--embedding=<x>=~/b.pt", "--model=~/m"])
    home = f"{tmp_path}/home"
    assert (f.lora, f.embedding, f.model) == ([f"{home}/a.safetensors:0.5"], [f"<x>={home}/b.pt"], f"{home}/m")
    f = parse_evaluation(["x", "--prompts=~/p.txt", "--output=~/r"])
    assert (f.prompts, f.output) == (f"{home}/p.txt", f"{home}/r")


def test_every_flag_of_a_path_is_checked():
    """Found by going through all of them, so that a new one is among them."""
    names = [option.name for option in flags.OPTIONS.values() if option.path]
    assert {"model", "output", "lora", "image", "mask", "cache_dir", "prompts_file", "from_png"} <= set(names)
    beside = ["sample.py", CASTLE, "--image=a", "--control_image=b", "--style=c", "--preview"]
    for name in names:
        with pytest.raises(
            UsageError, match=rf"^--{name}='' is not a path: name a file or folder, or leave --{name} out"
        ):
            flags.parse([*beside, f"--{name}="])
        with pytest.raises(UsageError, match=rf"^--{name} xxx\S* has a name of 300 bytes, above 255: shorten it"):
            flags.parse([*beside, f"--{name}={'x' * 300}/y"])


# Numbers and sizes that cannot be, before weights are read.


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["--height=1000000", "--width=1000000"], "--height 1000000 and width 1000000 take at least"),
        (["--height=1000000", "--width=1000000", "--tile=8"], "--height 1000000 and width 1000000 take at least"),
        (["--image=a.png", "--outpaint=1000000,0,0,100000000"], "--outpaint makes "),
        (["--batch_size=1000000000"], "--batch_size is too large: "),
        (["--from_png=none.png"], "--from_png: none.png does not exist: check the path"),
        (["--num_images=1000000000"], "--num_images 1000000000 makes more than 1000000 images"),
        (["--interpolate=1000000000"], "--interpolate 1000000000 makes more than 1000000 images"),
        (["--steps=1000000000"], "--steps 1000000000 is too many: give at most 10000"),
        (["--prompt_2=a"], "--prompt_2 is for the second text encoder of SDXL, which this model lacks"),
        (["--hires=1"], "--hires 1.0 must be above 1"),
        (["--clip_skip=99"], "--clip_skip 99 must be 0 to 1"),
        (["--lora=a.png:abc"], "--lora: a.png:abc does not exist: check the path, and write the weight as a number"),
        (["--lora=a.png"], "--lora: a.png"),
        (["--embedding=a.png"], "--embedding: a.png"),
        (["--controlnet=a.png", "--control_image=a.png"], "--controlnet: "),
        (["--preview", "--preview_vae=a.png"], "--preview_vae: "),
        (["--control_image=a.png"], "--control_image are for ControlNets, and this model has none"),
        (["--noise_level=3"], "--noise_level is for upscaling models"),
        (["--prompts_file=a.jsonl"], "--prompts_file: Line 1 of a.jsonl has the seed -1"),
        (["--prompt=<lora:x:1> a", "--lora_dir=."], "--lora_dir . has no x.safetensors for <lora:x>: it has no LoRA"),
        (["--lora_dir=.", "--noemphasis"], "--lora_dir is for <lora:…> in prompts, which --noemphasis reads as words"),
        (["--prompt=<lora:x:y> a", "--lora_dir=."], "--prompt: <lora:x:y> has weights that cannot be read"),
        (["--prompt=<lora:x> a", "--lora_dir=gone"], "--lora_dir: gone does not exist: check the path"),
        (["--fsdp=3"], "--fsdp 3 must divide the number of devices, 1"),
        (["--tensor=2"], "--fsdp 1 x tensor 2 must divide the number of devices, 1"),
    ],
)
def test_what_cannot_be_is_found_before_weights(given, sentence, sample_cli, monkeypatch):
    monkeypatch.setattr(jaxdiff, "load", lambda *args, **more: pytest.fail("weights were read"))
    write_png("a.png", np.zeros((16, 16, 3)))
    Path("a.jsonl").write_text('{"prompt": "a", "seed": -1}')
    code, out, err = sample_cli(CASTLE, "--output=new/x.png", *given)
    assert (code, out) == (2, [])
    assert sentence in err
    assert err.startswith("sample.py: error: ")
    assert err.count("\n") == 1
    assert existing() == ["a.jsonl", "a.png"]


def test_large_but_possible_sizes_are_planned(tiny):
    settings = jaxdiff.sampling.resolve.resolve_settings(tiny[0], height=2048, width=2048)
    assert (settings.height, settings.width) == (2048, 2048)


@pytest.mark.parametrize("seed", [-1, 2**32, 10**30])
def test_seeds_of_a_prompts_file(seed, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(f'{{"prompt": "a", "seed": {seed}}}')
    with pytest.raises(PromptError, match=rf"^Line 1 of \S* has the seed {seed}; seeds are from 0 to 4294967295"):
        read_prompts(path)
    path.write_text('{"prompt": "a", "seed": 4294967295}')
    assert read_prompts(path)[0].seed == 2**32 - 1


# LoRAs that prompts name.


@pytest.fixture
def loras(tiny, tmp_path):
    """A folder with two LoRAs, of both networks."""
    model, params = tiny
    for i, name in enumerate(("detail", "sub/ink")):
        lora = init_lora(model, params, 2, 2.0, ("unet", "text_encoder"), key=jax.random.key(i))
        path = tmp_path / "loras" / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        jaxdiff.save_lora(path, model, jax.tree.map(lambda x: x + 0.5, lora), "kohya")
    return tmp_path / "loras"


def test_loras_act_by_name(sample_cli, planes, tiny, loras):
    """As `load_lora` lays them, text encoder and UNet with their own weights; images of others are drawn without."""
    model, params = tiny
    detail, ink = (read_lora(model, loras / f"{name}.safetensors") for name in ("detail", "sub/ink"))
    prompts = ["a <lora:detail:0.7>", "b<lyco:ink:0.5:-2> <lora:detail>", "c", "d", "e <lora:sub/ink:0>"]
    given = [f"--prompt={p}" for p in prompts]
    code, out, err = sample_cli(*given, "--lora_dir=loras", "--output=o", "--batch_size=2")
    assert (code, err, len(planes)) == (0, "", 4)
    assert (read_metadata(out[0])["batch_size"], len(out)) == (2, 5)

    def parts(lora, text_encoder, unet):
        return [{n: x for n, x in lora.items() if n.startswith(m)} for m in ("text_encoder", "unet")], [
            text_encoder,
            unet,
        ]

    (ink_parts, ink_weights), (detail_parts, detail_weights) = parts(ink, 0.5, -2), parts(detail, 1, 1)
    expected = [
        jaxdiff.load_lora(model, params, loras / "detail.safetensors", 0.7),
        merge_lora(params, ink_parts + detail_parts, ink_weights + detail_weights),
        params,
        params,
    ]
    for found, wanted in zip(planes, expected, strict=True):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7), dict(found), dict(wanted))
    assert [read_metadata(path)["prompt"] for path in out] == prompts  # as typed, to be drawn again
    code, out, _ = sample_cli(f"--from_png={out[0]}", "--output=again.png")
    assert (code, read_metadata("again.png")["lora_dir"]) == (0, "loras")


def test_loras_of_one_name(sample_cli, planes, loras):
    (loras / "ink.pt").touch()
    code, _, err = sample_cli("--prompt=<lora:detail> a", "--prompt=<lora:ink:1> a", "--lora_dir=loras")
    assert (code, planes) == (0, []) or code == 2
    (loras / "other").mkdir()
    (loras / "other" / "detail.pt").touch()
    (loras / "detail.safetensors").rename(loras / "sub" / "detail.safetensors")
    code, _, err = sample_cli("--prompt=<lora:detail> a", "--lora_dir=loras")
    assert code == 2
    assert "--lora_dir: <lora:detail> may be loras/other/detail.pt and loras/sub/detail.safetensors" in err


def test_loras_by_the_name_in_their_metadata(sample_cli, planes, tiny, loras):
    """As the AUTOMATIC1111 web UI finds them, where no file has the name."""
    detail, ink = loras / "detail.safetensors", loras / "sub/ink.safetensors"
    save_file(load_file(ink), loras / "a.safetensors", {"ss_output_name": "detail"})  # which a file is called
    save_file(load_file(ink), loras / "b.safetensors", {"ss_output_name": "my ink"})
    (loras / "damaged.safetensors").write_bytes(b"x")
    code, _, err = sample_cli("--prompt=<lora:my ink:0.5> a", "--prompt=<lora:detail> a", "--lora_dir=loras")
    assert (code, len(planes)) == (0, 2), err
    for found, (file, weight) in zip(planes, ((ink, 0.5), (detail, 1)), strict=True):
        jax.tree.map(np.testing.assert_allclose, dict(found), dict(jaxdiff.load_lora(*tiny, file, weight)))
    save_file(load_file(ink), loras / "c.safetensors", {"ss_output_name": "my ink"})
    code, _, err = sample_cli("--prompt=<lora:my ink> a", "--lora_dir=loras")
    assert code == 2
    assert "<lora:my ink> may be loras/b.safetensors and loras/c.safetensors: write <lora:b>" in err


def test_tags_without_a_folder_are_said(sample_cli, planes):
    code, _, err = sample_cli("--prompt=a <lora:detail:0.7>, <hypernet:y:1>", "--output=x.png")
    assert code == 0
    assert (
        "has <lora:detail:0.7>, which is left out: sample.py applies it if it is in --prompt and --lora_dir is given"
        in err
    )
    assert "hypernetworks are not supported" in err
