"""Images of the transformer families against PyTorch diffusers' pipelines, on the same random weights."""

import numpy as np
import pytest
from safetensors.numpy import save_file

pytest.importorskip("diffusers")
import jaxdiff
from jaxdiff.errors import ArgumentError
from jaxdiff.io.images import read_image
from tests.support import transformer_pipelines as oracle

PROMPTS = ["a castle at night", ""]
VARIANTS = ("schnell", "sd3_without_t5", "flux2_distilled")  # of the same code, tried where they differ
CASES = [((8, 12), 4, 3.5), ((16, 8), 1, 1.0), ((8, 8), 7, 0.0)]  # latents, steps, guidance


@pytest.fixture(scope="module", params=oracle.FAMILIES)
def pair(request, tmp_path_factory):
    """(family, PyTorch's pipeline, our model, its parameters)."""
    folder = tmp_path_factory.mktemp(request.param)
    pipe = oracle.pipeline(request.param, folder / "tokenizers")
    pipe.save_pretrained(folder / "model")
    return request.param, pipe, *jaxdiff.load(folder / "model")


def noise_of(size):
    return np.random.default_rng(0).normal(size=(2, *size, oracle.CHANNELS)).astype(np.float32)


def of_families(pair):
    """The fixture's parts; skips the variants."""
    if pair[0] in VARIANTS:
        pytest.skip("the same as the family's")
    return pair


@pytest.mark.parametrize(("size", "steps", "guidance"), CASES)
def test_draws_what_pytorch_draws(pair, size, steps, guidance):
    family, pipe, model, params = pair
    if family in VARIANTS and steps != CASES[0][1]:
        pytest.skip("the same as the family's")
    expected = oracle.draw(pipe, PROMPTS, noise_of(size), steps, guidance)
    found = jaxdiff.generate(model, params, PROMPTS, steps=steps, guidance_scale=guidance, noise=noise_of(size))
    assert expected.std() > 0.05
    assert np.abs(found - 255 * expected).max() <= 3


@pytest.mark.parametrize("task", ["img2img", "inpaint"])
def test_redraws_what_pytorch_redraws(pair, task, monkeypatch):
    import diffusers

    family, pipe, model, params = pair
    names = {"flux": "Flux", "sd3": "StableDiffusion3", "z_image": "ZImage"}
    if family not in names:
        pytest.skip("the same task of the same code; PyTorch's FLUX.2 reads the image otherwise")
    cls = getattr(diffusers, f"{names[family]}{'Img2Img' if task == 'img2img' else 'Inpaint'}Pipeline")
    same = cls(**{name: part for name, part in pipe.components.items() if name in cls.__init__.__annotations__})
    same.set_progress_bar_config(disable=True)
    noise, images = noise_of((8, 12)), np.random.default_rng(2).random((2, 16, 24, 3)).astype(np.float32)
    expected = oracle.redraw(same, PROMPTS, images, noise, monkeypatch, task == "inpaint")
    given = {"image": images, "steps": 5, "strength": 0.5, "guidance_scale": 2.0, "noise": noise}
    if task == "inpaint":
        given["mask"] = oracle.MASK
    assert np.abs(jaxdiff.generate(model, params, PROMPTS, **given) - 255 * expected).max() <= 3


def test_a_saved_folder_opens_in_pytorch_and_draws_the_same(pair, tmp_path):
    family, pipe, model, params = pair
    jaxdiff.save(tmp_path / "saved", model, params)
    # diffusers opens a folder without T5 only when told.
    absent = {"text_encoder_3": None, "tokenizer_3": None} if family == "sd3_without_t5" else {}
    again = type(pipe).from_pretrained(tmp_path / "saved", **absent)
    again.set_progress_bar_config(disable=True)
    drawn = [oracle.draw(p, PROMPTS, noise_of((8, 8)), 2, 2.0) for p in (pipe, again)]
    np.testing.assert_array_equal(*drawn)
    assert jaxdiff.load(tmp_path / "saved")[0] == model


@pytest.mark.parametrize("prefix", ["transformer.", "diffusion_model.", "base_model.model."])
def test_a_lora_changes_the_image_as_in_pytorch(pair, prefix, tmp_path):
    """Of every attention's queries and outputs, as peft and as ai-toolkit write it."""
    import torch

    family, pipe, model, params = pair
    if family not in ("flux", "z_image", "sd3", "flux2"):
        pytest.skip("the same transformer")
    rng = np.random.default_rng(3)
    weights = {
        name.removesuffix(".weight"): tensor
        for name, tensor in pipe.transformer.state_dict().items()
        if name.endswith(("to_q.weight", "to_out.0.weight", "to_qkv_mlp_proj.weight"))
    }
    file = {}
    for name, tensor in weights.items():
        file[f"{prefix}{name}.lora_A.weight"] = rng.normal(size=(2, tensor.shape[1])).astype(np.float32)
        file[f"{prefix}{name}.lora_B.weight"] = rng.normal(size=(tensor.shape[0], 2)).astype(np.float32)
    save_file(file, tmp_path / "lora.safetensors")
    before = {name: tensor.clone() for name, tensor in weights.items()}
    for name, tensor in weights.items():
        up, down = (torch.tensor(file[f"{prefix}{name}.lora_{part}.weight"]) for part in "BA")
        tensor += 0.1 * up @ down  # state_dict shares its memory
    expected = oracle.draw(pipe, PROMPTS, noise_of((8, 8)), 2, 2.0)
    for name, tensor in weights.items():
        tensor.copy_(before[name])
    changed = jaxdiff.load_lora(model, params, tmp_path / "lora.safetensors", scale=0.1)
    given = {"steps": 2, "guidance_scale": 2.0, "noise": noise_of((8, 8))}
    found = jaxdiff.generate(model, changed, PROMPTS, **given)
    assert np.abs(found - 255 * expected).max() <= 3
    assert np.abs(found.astype(int) - jaxdiff.generate(model, params, PROMPTS, **given)).max() > 10


def test_the_command_draws(pair, tmp_path, capsys):
    from jaxdiff.cli.sample import main

    family, _, model, params = pair
    jaxdiff.save(tmp_path / "model", model, params)
    given = [f"--model={tmp_path / 'model'}", "--prompt=a castle", "--steps=2", "--height=16", "--width=16"]
    output = tmp_path / "a.png"
    assert main(["sample.py", *given, f"--output={output}", "--preview", "--scheduler=heun"]) == 0
    assert {path.name for path in tmp_path.glob("*.png")} == {"a.png", "a-preview.png"}
    assert main(["sample.py", *given, f"--output={tmp_path / 'b.png'}", "--scheduler=heun", "--offload=text"]) == 0
    difference = read_image(output).astype(int) - read_image(tmp_path / "b.png")
    assert np.abs(difference).max() <= 1  # other programs may round otherwise
    refused = {"--embedding=x": "UNet", "--clip_skip=1": "clip_skip", "--height=18": "multiple of 4"}
    if family == "sd3" or family == "sd3_without_t5":
        del refused["--clip_skip=1"]
    if family in ("flux", "schnell", "flux2_distilled"):
        refused["--negative_prompt=x"] = "distilled"
    if family in ("schnell", "flux2_distilled"):
        refused["--guidance_scale=2"] = "no effect"
    for flag, words in refused.items():
        assert main(["sample.py", *given, flag, f"--output={output}"]) == 2
        assert words in capsys.readouterr().err


def test_a_size_that_makes_no_patches_is_refused(pair):
    _, _, model, params = of_families(pair)
    with pytest.raises(ArgumentError, match="multiple of 4"):
        jaxdiff.generate(model, params, "a castle", height=18, width=16, steps=1)


def test_latents_of_an_image_decode_to_it(pair):
    """What `encode` makes is what `decode` undoes: the autoencoder's own reconstruction."""
    _, pipe, model, params = of_families(pair)
    import torch

    images = np.random.default_rng(1).random((1, 16, 24, 3)).astype(np.float32)
    latents = jaxdiff.encode(model, params, images)
    assert latents.shape == (1, 8, 12, oracle.CHANNELS)
    with torch.no_grad():
        z = pipe.vae.encode(torch.tensor(2 * images - 1).permute(0, 3, 1, 2)).latent_dist.mean
        expected = pipe.vae.decode(z).sample.permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(jaxdiff.decode(model, params, latents), np.clip(expected / 2 + 0.5, 0, 1), atol=1e-4)
