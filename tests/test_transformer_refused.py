"""Files that do not fit a model with a transformer: a sentence that names the flag, before any weights are read."""

import json
import re
import shutil
import types

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

pytest.importorskip("diffusers")
import jaxdiff
from jaxdiff.cli import sample
from jaxdiff.errors import WeightsError
from jaxdiff.io import tensor_files
from jaxdiff.sampling.resolve import lowres_shape
from tests.support.transformer_pipelines import original


@pytest.fixture(scope="module")
def folders(made_transformers):
    """The folder of a small model of each family. Not to be written to."""
    return {family: made_transformers.pipe(family)[1] for family in ("flux", "sd3", "z_image")}


@pytest.fixture
def refuses(monkeypatch, capsys, tmp_path):
    """Runs a command line that must end with exit code 2, and with nothing read: the sentence that it prints."""

    def read(*_):
        raise AssertionError("weights are read")

    monkeypatch.setattr(tensor_files, "place", read)

    def run(folder, *flags):
        argv = ["sample.py", f"--model={folder}", "--prompt=a castle", "--steps=1", f"--output={tmp_path / 'x.png'}"]
        size = [] if any("--height" in flag for flag in flags) else ["--height=16", "--width=16"]
        assert sample.main([*argv, *size, *flags]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1, lines
        return lines[0]

    return run


@pytest.fixture
def copy(folders, tmp_path):
    """A copy of a family's folder, to be damaged."""
    return lambda family: shutil.copytree(folders[family], tmp_path / family)


def transformer(folder):
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


def lora(path, layer, down, up):
    rng = np.random.default_rng(0)
    save_file(
        {
            f"diffusion_model.{layer}.lora_A.weight": rng.normal(size=down).astype(np.float32),
            f"diffusion_model.{layer}.lora_B.weight": rng.normal(size=up).astype(np.float32),
        },
        path,
    )
    return f"--lora={path}"


def gguf(path, tensors, kind="flux"):
    library = pytest.importorskip("gguf")
    writer = library.GGUFWriter(path, kind)
    for name, x in tensors.items():
        writer.add_tensor(name, x)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_loras_that_do_not_fit(folders, refuses, tmp_path):
    flux, z_image, file = folders["flux"], folders["z_image"], tmp_path / "lora.safetensors"
    err = refuses(flux, lora(file, "layers.0.attention.qkv", (2, 32), (96, 2)))
    assert "--lora: " in err
    assert "lora.safetensors is a LoRA for Z-Image, this model is Flux" in err
    err = refuses(z_image, lora(file, "double_blocks.0.img_attn.qkv", (2, 48), (144, 2)))
    assert "lora.safetensors is a LoRA for Flux, this model is Z-Image" in err
    err = refuses(z_image, lora(file, "joint_blocks.0.x_block.attn.qkv", (2, 48), (144, 2)))
    assert "is a LoRA for Stable Diffusion 3, this model is Z-Image" in err
    # Three of our layers are one of theirs: of another width, for one of ours alone, of factors that do not meet.
    for down, up in (((2, 32), (192, 2)), ((2, 32), (32, 2)), ((2, 64), (96, 2)), ((2, 32), (96, 3))):
        err = refuses(flux, lora(file, "double_blocks.0.img_attn.qkv", down, up))
        assert "--lora: " in err
        assert "lora.safetensors does not fit this model: " in err
        assert ("for a layer of 96 outputs" if up[0] != 96 else "transformer_blocks.0.attn.to_") in err


def test_transformers_that_do_not_fit(folders, refuses, tmp_path, tiny_folder):
    flux, file = folders["flux"], tmp_path / "one.safetensors"
    flag, tensors = f"--transformer={file}", original("flux", transformer(folders["flux"]))
    save_file(original("sd3", transformer(folders["sd3"])), file)
    err = refuses(flux, flag)
    assert "--transformer: " in err
    assert "one.safetensors holds a transformer of sd3, and the folder's is of flux: give one of the same family" in err
    for name, shape in ((f"{LAYER}.weight_scale", (6, 2)), ("double_blocks.0.img_mod.scale_weight", (1,))):
        save_file({**tensors, name: np.ones(shape, np.float32)}, file)
        assert f"--transformer: {file} is quantised with scales of its own ({name})" in refuses(flux, flag)
    name = "double_blocks.0.img_attn.qkv.weight"
    for rows in (64, 192):
        save_file({**tensors, name: np.zeros((rows, 32), np.float32)}, file)
        assert f"has shape [{rows}, 32], its config.json calls for [32, 32]" in refuses(flux, flag)
    save_file({n: x for n, x in tensors.items() if n != name}, file)
    assert "lacks the tensor transformer_blocks.0.attn." in refuses(flux, flag)
    assert "--transformer: " in refuses(tiny_folder, flag)
    assert "--transformer: /nowhere does not exist" in refuses(flux, "--transformer=/nowhere")


LAYER = "double_blocks.0.img_mod.lin"


@pytest.mark.parametrize(
    ("kind", "scale", "words"),
    [
        (np.float32, 1.0, f"has {LAYER}.weight of float32 with scales of float64, which cannot be read"),
        (np.uint8, 1.0, f"has {LAYER}.weight of uint8 with scales of float64"),
        (np.int8, 1, f"has {LAYER}.weight of int8 with scales of int64"),
        (np.int8, np.nan, f"{LAYER}.scale_weight must be finite"),
    ],
)
def test_scales_that_cannot_be_read(kind, scale, words, folders, tmp_path):
    tensors, file = original("flux", transformer(folders["flux"])), tmp_path / "one.safetensors"
    changed = {f"{LAYER}.weight": tensors[f"{LAYER}.weight"].astype(kind), f"{LAYER}.scale_weight": np.array(scale)}
    save_file(tensors | changed, file)
    with pytest.raises(WeightsError, match=re.escape(words)):
        jaxdiff.load(folders["flux"], transformer=file)


def test_gguf_files_that_do_not_fit(folders, refuses, tmp_path):
    flux = folders["flux"]
    other = gguf(tmp_path / "llama.gguf", {"blk.0.attn_q.weight": np.zeros((32, 32), np.float32)}, "llama")
    assert "llama.gguf holds no transformer that is known here" in refuses(flux, f"--transformer={other}")
    assert "goes with such a folder, as --transformer" in refuses(other)
    whole = gguf(tmp_path / "whole.gguf", original("flux", transformer(flux))).read_bytes()
    for part in (len(whole) - 100, len(whole) // 2, 2000, 20):
        (tmp_path / "part.gguf").write_bytes(whole[:part])
        err = refuses(flux, f"--transformer={tmp_path / 'part.gguf'}")
        assert f"--transformer: {tmp_path / 'part.gguf'} is damaged or not a GGUF file" in err


def test_whole_checkpoints_say_how_they_are_opened(folders, refuses, tmp_path):
    """As ComfyUI's of FLUX.1 and of SD 3.5 without the CLIPs, with T5 and an autoencoder beside the transformer."""
    for family, name in (("flux", "Flux"), ("sd3", "Stable Diffusion 3"), ("z_image", "Z-Image")):
        tensors = original(family, transformer(folders[family]))
        file = {f"model.diffusion_model.{n}": x for n, x in tensors.items()}
        file["text_encoders.t5xxl.transformer.shared.weight"] = file["vae.decoder.conv_in.bias"] = np.zeros(
            4, np.float32
        )
        save_file(file, tmp_path / "all.safetensors")
        err = refuses(tmp_path / "all.safetensors")
        why = "and lacks a text encoder" if family == "sd3" else ", whose tokenizers no file of weights holds"
        assert f"all.safetensors is of {name} {why}".replace(" ,", ",") in err
        assert "and this file as --transformer" in err


def test_text_encoders_that_are_missing_or_others(copy, refuses):
    flux = copy("flux")
    index = json.loads((flux / "model_index.json").read_text())
    (flux / "model_index.json").write_text(json.dumps({**index, "text_encoder_2": [None, None]}))
    err = refuses(flux)
    assert "--model: " in err
    assert "lists no text_encoder_2, which FluxPipeline needs (T5EncoderModel): fetch the whole model" in err
    (flux / "model_index.json").write_text(json.dumps(index))
    (flux / "text_encoder_2" / "model.safetensors").rename(flux / "other")
    assert "text_encoder_2/model.safetensors is missing" in refuses(flux)
    (flux / "other").rename(flux / "text_encoder_2" / "model.safetensors")
    file = flux / "text_encoder_2" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "d_model": 8}))
    assert "reads texts of joint_attention_dim 40 and text encoders that make 8" in refuses(flux)


@pytest.mark.slow
def test_autoencoders_of_other_latents(copy, refuses, tiny_folder):
    flux = copy("flux")
    assert "--vae: " in refuses(flux, f"--vae={tiny_folder / 'vae'}")
    assert "take an autoencoder of its family" in refuses(flux, f"--vae={tiny_folder / 'vae'}")
    shutil.rmtree(flux / "vae")
    shutil.copytree(tiny_folder / "vae", flux / "vae")
    err = refuses(flux)
    assert "has a transformer of 16 latent channels and an autoencoder of 4: take the autoencoder" in err


def test_an_autoencoder_of_the_family_takes_the_place_of_the_models(folders):
    model, params = jaxdiff.load(folders["flux"], parts=["transformer"])
    found, changed = jaxdiff.load_vae(model, params, folders["sd3"] / "vae")
    assert found.vae.config == model.vae.config
    assert set(changed) == {"transformer", "vae"}


def test_tokenizers_that_are_missing_or_damaged(copy, refuses):
    flux = copy("flux")
    (flux / "tokenizer_2" / "tokenizer.json").write_text("{")
    err = refuses(flux)
    assert "--model: " in err
    assert "cannot be opened by transformers" in err
    shutil.rmtree(flux / "tokenizer_2")
    assert "tokenizer_2 holds no tokenizer: put tokenizer.json there" in refuses(flux)
    z_image = copy("z_image")
    file = z_image / "tokenizer" / "tokenizer_config.json"
    values = json.loads(file.read_text())
    values.pop("chat_template", None)
    file.write_text(json.dumps(values))
    (z_image / "tokenizer" / "chat_template.jinja").unlink(missing_ok=True)
    assert "tokenizer holds no chat template, which this model needs" in refuses(z_image)


def test_sizes(folders, refuses):
    assert "--height 18 must be a positive multiple of 4" in refuses(folders["flux"], "--height=18", "--width=16")
    # Of 12 patches along a side, of 4 pixels each.
    assert "--width 52 must be at most 48" in refuses(folders["sd3"], "--height=16", "--width=52")
    assert "--height 132 must be at most 128" in refuses(folders["z_image"], "--height=132", "--width=16")


def test_sizes_that_are_decided_are_whole_patches(folders):
    """Of an image that is drawn smaller first, and of one that is extended."""
    assert lowres_shape((64, 36, 16), 1.5, 2) == (42, 24, 16)
    assert lowres_shape((64, 36, 16), 1.5) == (43, 24, 16)
    model, _ = jaxdiff.load(folders["flux"], parts=[])
    flags = types.SimpleNamespace(outpaint=(0, 0, 3, 0), height=None, width=None)
    assert sample.outpainted_size(flags, model, (16, 16, 3)) == {"height": 16, "width": 16}
