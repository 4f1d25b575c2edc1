"""Images of the transformer families against PyTorch diffusers' pipelines, on the same random weights."""

import inspect

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

pytest.importorskip("diffusers")
import jaxdiff
from jaxdiff.cli.sample import main
from jaxdiff.errors import ArgumentError
from jaxdiff.io.images import read_image
from jaxdiff.sampling.resolve import resolve_images, resolve_settings
from tests.support import transformer_pipelines as oracle

PROMPTS = ["a castle at night", ""]
MAIN = ("flux", "sd3", "z_image", "flux2")
VARIANTS = ("schnell", "sd3_without_t5", "flux2_distilled")  # of the same code, tried where they differ
SIZE = (8, 12)  # of latents; one size and kind of guidance is one program
CASES = [
    *((family, SIZE, 4, 3.5) for family in (*MAIN, *VARIANTS)),
    *((family, (16, 8), steps, guidance) for family in MAIN for steps, guidance in ((1, 1.0), (7, 0.0))),
]


@pytest.fixture
def pair(request, made_transformers):
    """(family, PyTorch's pipeline, our model, its parameters)."""
    return request.param, made_transformers.pipe(request.param)[0], *made_transformers.model(request.param)


def of(*families):
    return pytest.mark.parametrize("pair", families, indirect=True)


def noise_of(size):
    return np.random.default_rng(0).normal(size=(2, *size, oracle.CHANNELS)).astype(np.float32)


def test_flux2_reads_the_layers_that_pytorch_reads():
    """Which the small pipelines here have fewer of."""
    from diffusers import Flux2KleinPipeline

    arguments = inspect.signature(Flux2KleinPipeline.__call__).parameters
    assert arguments["text_encoder_out_layers"].default == oracle.PUBLISHED_LAYERS


@pytest.mark.slow
@pytest.mark.parametrize(("pair", "size", "steps", "guidance"), CASES, indirect=["pair"])
def test_draws_what_pytorch_draws(pair, size, steps, guidance):
    _, pipe, model, params = pair
    expected = oracle.draw(pipe, PROMPTS, noise_of(size), steps, guidance)
    found = jaxdiff.generate(model, params, PROMPTS, steps=steps, guidance_scale=guidance, noise=noise_of(size))
    assert expected.std() > 0.05
    assert np.abs(found - 255 * expected).max() <= 3


@pytest.mark.slow
@of("flux", "sd3", "z_image")  # PyTorch's FLUX.2 reads the image otherwise
@pytest.mark.parametrize("task", ["img2img", "inpaint"])
def test_redraws_what_pytorch_redraws(pair, task, monkeypatch):
    import diffusers

    family, pipe, model, params = pair
    names = {"flux": "Flux", "sd3": "StableDiffusion3", "z_image": "ZImage"}
    cls = getattr(diffusers, f"{names[family]}{'Img2Img' if task == 'img2img' else 'Inpaint'}Pipeline")
    same = cls(**{name: part for name, part in pipe.components.items() if name in cls.__init__.__annotations__})
    same.set_progress_bar_config(disable=True)
    noise, images = noise_of(SIZE), np.random.default_rng(2).random((2, 16, 24, 3)).astype(np.float32)
    expected = oracle.redraw(same, PROMPTS, images, noise, monkeypatch, task == "inpaint")
    given = {"image": images, "steps": 5, "strength": 0.5, "guidance_scale": 2.0, "noise": noise}
    if task == "inpaint":
        given["mask"] = oracle.MASK
    assert np.abs(jaxdiff.generate(model, params, PROMPTS, **given) - 255 * expected).max() <= 3


@of(*MAIN, *VARIANTS)
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


@of(MAIN[0], *(pytest.param(family, marks=pytest.mark.slow) for family in MAIN[1:]))
def test_a_lora_changes_the_image_as_in_pytorch(pair, tmp_path):
    """Of every attention's queries and outputs, as peft and as ai-toolkit write it."""
    import torch

    _, pipe, model, params = pair
    rng = np.random.default_rng(3)
    weights = {
        name.removesuffix(".weight"): tensor
        for name, tensor in pipe.transformer.state_dict().items()
        if name.endswith(("to_q.weight", "to_out.0.weight", "to_qkv_mlp_proj.weight"))
    }
    file = {}
    for name, tensor in weights.items():
        file[f"{name}.lora_A.weight"] = rng.normal(size=(2, tensor.shape[1])).astype(np.float32)
        file[f"{name}.lora_B.weight"] = rng.normal(size=(tensor.shape[0], 2)).astype(np.float32)
    before = {name: tensor.clone() for name, tensor in weights.items()}
    for name, tensor in weights.items():
        up, down = (torch.tensor(file[f"{name}.lora_{part}.weight"]) for part in "BA")
        tensor += 0.1 * up @ down  # state_dict shares its memory
    expected = oracle.draw(pipe, PROMPTS, noise_of(SIZE), 2, 2.0)
    for name, tensor in weights.items():
        tensor.copy_(before[name])
    changes = []
    for prefix in ("transformer.", "diffusion_model.", "base_model.model."):
        save_file({f"{prefix}{name}": x for name, x in file.items()}, tmp_path / "lora.safetensors")
        changes.append(jaxdiff.load_lora(model, params, tmp_path / "lora.safetensors", scale=0.1))
    changed, *others = changes
    for other in others:
        jax.tree.map(np.testing.assert_array_equal, other, changed)
    given = {"steps": 2, "guidance_scale": 2.0, "noise": noise_of(SIZE)}
    found = jaxdiff.generate(model, changed, PROMPTS, **given)
    assert np.abs(found - 255 * expected).max() <= 3
    assert np.abs(found.astype(int) - jaxdiff.generate(model, params, PROMPTS, **given)).max() > 10


def flags(made, family):
    folder = made.pipe(family)[1]
    return ["sample.py", f"--model={folder}", "--prompt=a castle", "--steps=2", "--height=16", "--width=16"]


@pytest.mark.slow
@pytest.mark.parametrize("family", MAIN)
def test_the_command_draws(family, made_transformers, tmp_path):
    """With previews; FLUX.1 by a scheduler of two passes a step; and the same where the texts are encoded first.

    That is tried on pooled texts and on masks, which FLUX.1 and Z-Image have; there is nothing else to pass on.
    """
    given = [*flags(made_transformers, family), f"--scheduler={'heun' if family == 'flux' else 'euler'}"]
    assert main([*given, f"--output={tmp_path / 'a.png'}", "--preview"]) == 0
    assert {path.name for path in tmp_path.glob("*.png")} == {"a.png", "a-preview.png"}
    if family in ("flux", "z_image"):
        assert main([*given, f"--output={tmp_path / 'b.png'}", "--offload=text"]) == 0
        difference = read_image(tmp_path / "a.png").astype(int) - read_image(tmp_path / "b.png")
        assert np.abs(difference).max() <= 1  # other programs may round otherwise


@pytest.mark.parametrize("family", [*MAIN, *VARIANTS])
def test_the_command_refuses(family, made_transformers, tmp_path, capsys):
    given = flags(made_transformers, family)
    refused = {"--embedding=x": "UNet", "--clip_skip=1": "clip_skip", "--height=18": "multiple of 4"}
    if family == "sd3" or family == "sd3_without_t5":
        del refused["--clip_skip=1"]
    if family in ("flux", "schnell", "flux2_distilled"):
        refused["--negative_prompt=x"] = "is for guidance, which this model does without"
    if family in ("schnell", "flux2_distilled"):
        refused["--guidance_scale=2"] = "no effect"
    for flag, words in refused.items():
        assert main([*given, flag, f"--output={tmp_path / 'a.png'}"]) == 2
        assert words in capsys.readouterr().err


@of(*MAIN)
def test_a_size_that_makes_no_patches_is_refused(pair):
    _, _, model, params = pair
    with pytest.raises(ArgumentError, match="multiple of 4"):
        jaxdiff.generate(model, params, "a castle", height=18, width=16, steps=1)


@of("flux", "flux2")  # the others have FLUX.1's autoencoder
def test_latents_of_an_image_decode_to_it(pair):
    """What `encode` makes is what `decode` undoes: the autoencoder's own reconstruction."""
    _, pipe, model, params = pair
    import torch

    images = np.random.default_rng(1).random((1, 16, 24, 3)).astype(np.float32)
    latents = jax.jit(lambda p, x: jaxdiff.encode(model, p, x))(params, images)
    assert latents.shape == (1, 8, 12, oracle.CHANNELS)
    with torch.no_grad():
        z = pipe.vae.encode(torch.tensor(2 * images - 1).permute(0, 3, 1, 2)).latent_dist.mean
        expected = pipe.vae.decode(z).sample.permute(0, 2, 3, 1).numpy()
    decoded = jax.jit(lambda p, z: jaxdiff.decode(model, p, z))(params, latents)
    np.testing.assert_allclose(decoded, np.clip(expected / 2 + 0.5, 0, 1), atol=1e-4)


@of("flux")
def test_brackets_are_words_and_tags_are_left_out(pair, caplog):
    """Each is named in a warning."""
    _, _, model, _ = pair
    settings = resolve_settings(model, steps=1, height=16, width=16)
    found = resolve_images(model, settings, ["a (red:1.3) castle <lora:x:1>"]).images.tokens
    plain = resolve_images(model, settings, ["a (red:1.3) castle "], emphasis=False).images.tokens
    jax.tree.map(np.testing.assert_array_equal, found, plain)
    assert "has '(red:1.3)', drawn as words" in caplog.text
    assert "has <lora:x:1>, which is left out" in caplog.text
