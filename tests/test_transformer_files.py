"""Transformers in one file, in their authors' layout, against PyTorch diffusers' converters; quantised ones."""

import functools
import json
import re
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

pytest.importorskip("diffusers")
import torch

import jaxdiff
from jaxdiff.cli.sample import main
from jaxdiff.config import ConfigError
from jaxdiff.errors import WeightsError
from jaxdiff.io.diffusers_folder import load_model
from jaxdiff.io.images import read_image
from tests.support import transformer_pipelines as oracle
from tests.support.transformer_pipelines import converter, original


@pytest.fixture(scope="module", params=["flux", "sd3", "z_image", "flux2"])
def saved(request, made_transformers):
    """(family, the folder of a small pipeline, its transformer's tensors, our parameters)."""
    pipe, folder = made_transformers.pipe(request.param)
    tensors = {name: x.numpy() for name, x in pipe.transformer.state_dict().items()}
    return request.param, folder, tensors, made_transformers.model(request.param)[1]


def test_the_layout_is_the_one_that_pytorch_converts(saved):
    family, _, tensors, _ = saved
    theirs = {name: torch.tensor(x) for name, x in original(family, tensors).items()}
    assert len(theirs) < len(tensors)
    converted = converter(family, 32)(theirs)
    assert {name: x.shape for name, x in converted.items()} == {name: x.shape for name, x in tensors.items()}
    for name, x in tensors.items():
        np.testing.assert_array_equal(converted[name], x, err_msg=name)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_a_file_takes_the_place_of_the_folders_transformer(saved, prefix, layout, tmp_path):
    family, folder, tensors, params = saved
    file = original(family, tensors) if layout == "original" else tensors
    others = {"text_encoders.clip_l.logit_scale": np.ones(1, np.float32)} if prefix else {}
    save_file({f"{prefix}{name}": x for name, x in file.items()} | others, tmp_path / "one.safetensors")
    _, found = jaxdiff.load(folder, transformer=tmp_path / "one.safetensors")
    jax.tree.map(np.testing.assert_array_equal, found["transformer"], params["transformer"])


def test_the_file_says_how_many_blocks_there_are(saved, tmp_path):
    """Of SD 3, whose last block differs from the others, the file has one more than the config of its folder."""
    family, folder, tensors, params = saved
    if family == "sd3":
        config = folder / "transformer" / "config.json"
        folder = shutil.copytree(folder, tmp_path / "model")
        (folder / "transformer" / "config.json").write_text(
            json.dumps({**json.loads(config.read_text()), "num_layers": 2})
        )
        save_file(tensors, tmp_path / "all.safetensors")
        _, found = jaxdiff.load(folder, transformer=tmp_path / "all.safetensors")
        jax.tree.map(np.testing.assert_array_equal, found["transformer"], params["transformer"])
        return
    first = {"flux": "single_transformer_blocks.1", "flux2": "single_transformer_blocks.1", "z_image": "layers.1"}
    fewer = {name: x for name, x in tensors.items() if not name.startswith(f"{first[family]}.")}
    save_file(fewer, tmp_path / "fewer.safetensors")
    model, _ = jaxdiff.load(folder, transformer=tmp_path / "fewer.safetensors")
    assert len(jax.tree.leaves(jaxdiff.load(folder)[1])) > len(jax.tree.leaves(_))
    assert model.family == family


def test_files_of_eight_bits_are_widened(saved, tmp_path):
    """As ComfyUI's fp8 files: float8_e4m3fn."""
    family, folder, tensors, params = saved
    from safetensors.torch import save_file as save_torch

    half = {name: torch.tensor(x).to(torch.float8_e4m3fn) for name, x in original(family, tensors).items()}
    save_torch({name: x.contiguous() for name, x in half.items()}, tmp_path / "fp8.safetensors")
    _, found = jaxdiff.load(folder, transformer=tmp_path / "fp8.safetensors")
    rounded = jax.tree.map(lambda x: torch.tensor(np.asarray(x)).to(torch.float8_e4m3fn).float().numpy(),
                           params["transformer"])  # fmt: skip
    jax.tree.map(np.testing.assert_array_equal, found["transformer"], rounded)


SCALED = {  # how the files of each kind call the scale, its shape, and what lies beside it: layer -> tensors
    "ComfyUI's older": ("scale_weight", (), lambda layer: {f"{layer}.scale_input": torch.ones(())}),
    "ComfyUI's newer": (
        "weight_scale",
        (),
        lambda layer: {
            f"{layer}.comfy_quant": torch.frombuffer(bytearray(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
        },
    ),
    "one for each output": ("weight_scale", (-1, 1), lambda layer: {f"{layer}.input_scale": torch.ones(1)}),
    "whole numbers": ("weight_scale", (1,), lambda layer: {}),
}


LATENTS = {"flux": (0.3611, 0.1159), "sd3": (1.5305, 0.0609), "z_image": (0.3611, 0.1159)}  # published scale and shift


def test_latents_are_scaled_as_the_familys_where_the_folder_has_no_autoencoder(saved, tmp_path):
    """`--vae` brings a file then, which says nothing of the scale."""
    family, folder, *_ = saved
    without = shutil.copytree(folder, tmp_path / "model", ignore=shutil.ignore_patterns("vae"))
    config = load_model(without, "float32", without_vae=True).vae.config
    if family == "flux2":
        assert (config.CLASS_NAME, config.latent_channels) == ("AutoencoderKLFlux2", 32)
    else:
        assert (config.scaling_factor, config.shift_factor) == LATENTS[family]
        assert (config.latent_channels, config.use_quant_conv, config.use_post_quant_conv) == (16, False, False)


@pytest.mark.parametrize("kind", SCALED)
def test_eight_bits_times_the_scales_beside_them(saved, kind, tmp_path):
    family, folder, tensors, _ = saved
    from safetensors.torch import save_file as save_torch

    end, shape, beside = SCALED[kind]
    dtype, most = (torch.int8, 127) if kind == "whole numbers" else (torch.float8_e4m3fn, 448)
    written, expected = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}, {}
    for name, x in original(family, tensors).items():
        x = torch.tensor(x)
        expected[name] = x.numpy()
        written[name] = x
        if x.ndim == 2 and name.endswith(".weight"):
            layer = name.removesuffix(".weight")
            scale = x.abs().amax(1, keepdim=True) if shape == (-1, 1) else x.abs().max().reshape(shape)
            scale = (scale / most).clamp(min=1e-12)
            written[name] = (x / scale).round().to(dtype) if dtype == torch.int8 else (x / scale).to(dtype)
            expected[name] = (written[name].float() * scale).numpy()
            written |= {f"{layer}.{end}": scale, **beside(layer)}
    save_torch({f"model.diffusion_model.{n}": x.contiguous() for n, x in written.items()}, tmp_path / "a.safetensors")
    save_file(expected, tmp_path / "same.safetensors")
    _, found = jaxdiff.load(folder, transformer=tmp_path / "a.safetensors")
    _, same = jaxdiff.load(folder, transformer=tmp_path / "same.safetensors")
    jax.tree.map(np.testing.assert_array_equal, found["transformer"], same["transformer"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "F16", "BF16"])
def test_gguf(saved, kind, tmp_path):
    """Against the library's own quantisation and back; rows that are no multiple of a block stay float32."""
    gguf = pytest.importorskip("gguf")
    family, folder, tensors, params = saved
    writer = gguf.GGUFWriter(tmp_path / "q.gguf", family)
    wanted = getattr(gguf.GGMLQuantizationType, kind)
    expected = {}
    for name, x in original(family, tensors).items():
        blocks = x.ndim == 2 and x.shape[-1] % 32 == 0
        stored = gguf.quantize(x, wanted) if blocks else x
        expected[name] = gguf.dequantize(stored, wanted).reshape(x.shape) if blocks else x
        writer.add_tensor(name, stored, raw_dtype=wanted if blocks else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    save_file(expected, tmp_path / "same.safetensors")
    _, found = jaxdiff.load(folder, transformer=tmp_path / "q.gguf")
    _, same = jaxdiff.load(folder, transformer=tmp_path / "same.safetensors")
    jax.tree.map(np.testing.assert_array_equal, found["transformer"], same["transformer"])
    changed = [np.abs(a - b).max() for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(params), strict=True)]
    assert max(changed) > 0


def test_what_does_not_fit_is_refused(saved, tiny_folder, tmp_path):
    family, folder, tensors, _ = saved
    other = "flux" if family != "flux" else "sd3"
    names = {"flux": "double_blocks.0.img_mod.lin.weight", "sd3": "joint_blocks.0.x_block.attn.qkv.weight"}
    file = tmp_path / "other.safetensors"
    save_file({names[other]: np.zeros((4, 4), np.float32)}, file)
    with pytest.raises(WeightsError, match=f"holds a transformer of {other}, and the folder's is of {family}"):
        jaxdiff.load(folder, transformer=file)
    save_file({"a.weight": np.zeros((4, 4), np.float32)}, file)
    with pytest.raises(WeightsError, match="holds no transformer that is known here"):
        jaxdiff.load(folder, transformer=file)
    lacking = original(family, tensors)
    del lacking[next(name for name in lacking if "qkv.weight" in name or "linear2" in name)]
    save_file(lacking, file)
    with pytest.raises(WeightsError, match="lacks the tensor"):
        jaxdiff.load(folder, transformer=file)
    save_file({**tensors, "stray.weight": np.zeros(3, np.float32)}, file)
    with pytest.raises(WeightsError, match=r"1 tensors .* first stray\.weight"):
        jaxdiff.load(folder, transformer=file)
    with pytest.raises(ValueError, match="has a UNet"):
        jaxdiff.load(tiny_folder, transformer=file)
    (tmp_path / "damaged.gguf").write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(WeightsError, match=r"damaged or not a GGUF file"):
        jaxdiff.load(folder, transformer=tmp_path / "damaged.gguf")


@pytest.mark.slow
def test_the_command_takes_a_file(saved, tmp_path):
    from jaxdiff.cli.sample import main

    family, folder, tensors, _ = saved
    save_file(original(family, tensors), tmp_path / "one.safetensors")
    given = ["sample.py", f"--model={folder}", "--prompt=a castle", "--steps=1", "--height=16", "--width=16"]
    for name, more in (("a", []), ("b", [f"--transformer={tmp_path / 'one.safetensors'}"])):
        assert main([*given, *more, f"--output={tmp_path / name}.png"]) == 0
    from jaxdiff.io.images import read_image

    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), read_image(tmp_path / "b.png"))


def changes(kind: str, rng: np.random.Generator, out: int, inputs: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The tensors of a layer's adapter by how their names end, and what they change the weight by."""
    ups, downs = rng.normal(size=(2, out, 4)).astype(np.float32), rng.normal(size=(2, 4, inputs)).astype(np.float32)
    alpha = {"alpha": np.array(2, np.float32)}
    if kind == "loha":
        parts = {f"hada_w{i + 1}_{end}": x[i] for i in range(2) for end, x in (("a", ups), ("b", downs))}
        return {**parts, **alpha}, 0.5 * (ups[0] @ downs[0]) * (ups[1] @ downs[1])
    if kind == "difference":
        return {"diff": ups[0] @ downs[0]}, ups[0] @ downs[0]
    names = ("lora_A", "lora_B") if kind == "comfy" else ("lora_down", "lora_up")
    return {f"{names[0]}.weight": downs[0], f"{names[1]}.weight": ups[0], **alpha}, 0.5 * ups[0] @ downs[0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["comfy", "kohya", "loha", "difference"])
def test_a_lora_of_their_layers_changes_ours(saved, kind, tmp_path):
    """Merged into their weights, and those converted as PyTorch does; with an alpha of half the rank."""
    family, folder, tensors, _ = saved
    model, params = jaxdiff.load(folder)
    theirs, rng, file = original(family, tensors), np.random.default_rng(0), {}
    ours = {re.sub(r"\.weight$", "", n): x for n, x in theirs.items() if n.endswith(".weight") and x.ndim == 2}
    for layer, x in ours.items():
        stem = f"diffusion_model.{layer}" if kind == "comfy" else f"lora_unet_{layer.replace('.', '_')}"
        parts, change = changes(kind, rng, *x.shape)
        file |= {f"{stem}.{end}": part for end, part in parts.items()}
        theirs[f"{layer}.weight"] = x + 0.3 * change
    save_file(file, tmp_path / "lora.safetensors")
    save_file(theirs, tmp_path / "merged.safetensors")
    found = jaxdiff.load_lora(model, params, tmp_path / "lora.safetensors", scale=0.3)
    _, expected = jaxdiff.load(folder, transformer=tmp_path / "merged.safetensors")
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found["transformer"], expected["transformer"]
    )


def test_a_lokr_or_rotation_of_layers_that_are_several_of_ours_is_refused(saved, tmp_path):
    family, folder, tensors, _ = saved
    model, params = jaxdiff.load(folder)
    theirs = original(family, tensors)
    fused = next(name for name in theirs if "qkv" in name and name.endswith(".weight"))
    out, inputs = theirs[fused].shape
    stem = f"lora_unet_{fused.removesuffix('.weight').replace('.', '_')}"
    ones = functools.partial(np.ones, dtype=np.float32)
    for kind, parts in {
        "a LoKr": {"lokr_w1": ones((2, 2)), "lokr_w2": ones((out // 2, inputs // 2))},
        "an OFT": {"oft_blocks": ones((out // 2, 2, 2))},
        "an (IA)³": {"weight": ones(out), "on_input": ones(())},
    }.items():
        save_file({f"{stem}.{end}": x for end, x in parts.items()}, tmp_path / "a.safetensors")
        with pytest.raises(WeightsError, match=r"changes lora_unet_.*qkv by (.*), which stands for several") as error:
            jaxdiff.load_lora(model, params, tmp_path / "a.safetensors")
        assert f" by {kind}," in str(error.value)


def test_alpha_may_stand_in_the_metadata_alone(saved, tmp_path):
    """As diffusers writes it: `lora_adapter_metadata`."""
    _, folder, tensors, _ = saved
    model, params = jaxdiff.load(folder)
    layer = next(name for name in tensors if name.endswith(("attn.to_q.weight", "attention.to_q.weight")))
    out, inputs = tensors[layer].shape
    rng, stem = np.random.default_rng(0), f"transformer.{layer.removesuffix('.weight')}"
    file = {f"{stem}.lora_A.weight": rng.normal(size=(2, inputs)).astype(np.float32)}
    file[f"{stem}.lora_B.weight"] = rng.normal(size=(out, 2)).astype(np.float32)
    settings = {"transformer.r": 2, "transformer.lora_alpha": 6}
    changes = []
    for metadata in (None, {"lora_adapter_metadata": json.dumps(settings)}):
        save_file(file, tmp_path / "lora.safetensors", metadata)
        found = jaxdiff.load_lora(model, params, tmp_path / "lora.safetensors")
        changes.append(jax.tree.map(lambda a, b: np.asarray(a - b), found["transformer"], params["transformer"]))
    jax.tree.map(lambda one, three: np.testing.assert_allclose(three, 3 * one, atol=1e-5), *changes)
    assert max(np.abs(x).max() for x in jax.tree.leaves(changes[0])) > 0.1


def test_a_lora_of_another_family_is_refused(saved, tmp_path):
    family, folder, _, _ = saved
    model, params = jaxdiff.load(folder)
    stems = {"flux": "double_blocks.0.img_attn.qkv", "z_image": "layers.0.attention.qkv"}
    stem = stems["z_image" if family in ("flux", "flux2") else "flux"]
    file = {f"diffusion_model.{stem}.lora_{part}.weight": np.zeros((4, 4), np.float32) for part in "AB"}
    save_file(file, tmp_path / "lora.safetensors")
    with pytest.raises(WeightsError, match=r"lora\.safetensors .* which the model does not have"):
        jaxdiff.load_lora(model, params, tmp_path / "lora.safetensors")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(PyTorch's SD 3 without T5 of the published proportions, its folder, its tensors as ComfyUI's one file)."""
    folder = tmp_path_factory.mktemp("whole") / "model"
    pipe = oracle.sd3_of_published_proportions()
    pipe.save_pretrained(folder)
    return pipe, folder, oracle.one_file(pipe)


def test_a_whole_checkpoint_is_the_folder_without_t5(whole, tmp_path, caplog):
    """Parts that the file holds beside are passed over: T5 with a warning, and CLIP-L's projection as PyTorch does."""
    pipe, folder, tensors = whole
    others = {
        "text_encoders.t5xxl.transformer.shared.weight": np.ones((4, 4), np.float32),
        "text_encoders.clip_l.transformer.text_projection.weight": np.ones((16, 16), np.float32),
        "text_encoders.clip_l.logit_scale": np.ones((), np.float32),
        "model_sampling.sigmas": np.ones(1000, np.float32),
    }
    save_file(tensors | others, tmp_path / "all.safetensors")
    model, params = jaxdiff.load(tmp_path / "all.safetensors")
    said = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert [text for text in said if "T5 is left out, since no file of weights holds its tokenizer" in text] == said[:1]
    expected, same = jaxdiff.load(folder)
    assert jax.tree.structure(params) == jax.tree.structure(same)
    jax.tree.map(np.testing.assert_array_equal, params, same)
    assert model.modules["transformer"] == expected.modules["transformer"]
    assert model.modules["vae"] == expected.modules["vae"]
    assert (model.scheduler, model.options, model.family) == (expected.scheduler, expected.options, "sd3")
    noise = np.random.default_rng(0).normal(size=(2, 8, 8, 16)).astype(np.float32)
    prompts = ["a castle at night", ""]
    again = type(pipe).from_single_file(str(tmp_path / "all.safetensors"), config=str(folder), local_files_only=True,
                                        text_encoder_3=None, tokenizer_3=None)  # fmt: skip
    again.set_progress_bar_config(disable=True)
    found = jaxdiff.generate(model, params, prompts, steps=2, guidance_scale=3.0, noise=noise)
    for drawn in (oracle.draw(pipe, prompts, noise, 2, 3.0), oracle.draw(again, prompts, noise, 2, 3.0)):
        assert drawn.std() > 0.05
        assert np.abs(found - 255 * drawn).max() <= 3


def test_a_whole_checkpoint_without_its_autoencoder_takes_another(whole, tmp_path):
    """Its latents are then scaled as SD 3's."""
    _, folder, tensors = whole
    vae = {name: x for name, x in tensors.items() if name.startswith("first_stage_model.")}
    save_file({name: x for name, x in tensors.items() if name not in vae}, tmp_path / "pruned.safetensors")
    save_file(vae, tmp_path / "vae.safetensors")
    with pytest.raises(WeightsError, match=r"pruned\.safetensors has no autoencoder .* or give an autoencoder's file"):
        jaxdiff.load(tmp_path / "pruned.safetensors")
    model, params = jaxdiff.load(tmp_path / "pruned.safetensors", vae=tmp_path / "vae.safetensors")
    expected, same = jaxdiff.load(folder)
    assert (model.vae.config.scaling_factor, model.vae.config.shift_factor) == (1.5305, 0.0609)
    jax.tree.map(np.testing.assert_array_equal, params["vae"], same["vae"])
    assert model.vae.config.latent_channels == expected.vae.config.latent_channels


@pytest.mark.slow
def test_sample_draws_with_a_whole_checkpoint(whole, tmp_path):
    _, folder, tensors = whole
    save_file(tensors, tmp_path / "all.safetensors")
    for name, path in (("a", folder), ("b", tmp_path / "all.safetensors")):
        argv = ["sample.py", f"--model={path}", "--prompt=a castle", "--steps=1", "--height=16", "--width=16"]
        assert main([*argv, f"--output={tmp_path / name}.png"]) == 0
    np.testing.assert_array_equal(*(read_image(tmp_path / f"{name}.png") for name in "ab"))


CLIP_G = "text_encoders.clip_g.transformer."
X = "model.diffusion_model."


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({CLIP_G: None}, r"lacks a text encoder \(text_encoders\.clip_g\.transformer\.…\): fetch the file that"),
        ({"text_encoders.": None}, r"lacks a text encoder \(text_encoders\.clip_l\.transformer\.…\): .*--transformer"),
        ({f"{CLIP_G}text_projection.weight": None}, r"lacks the tensor text_encoders\.clip_g\.transformer\.text_proj"),
        ({f"{CLIP_G}text_projection.weight": (8, 24)}, "reads texts of pooled_projection_dim 36 and .* make 24"),
        ({f"{CLIP_G}text_model.encoder.layers.1.mlp.fc1.bias": None}, r"lacks the tensor text_encoders\.clip_g\..*fc1"),
        ({f"{X}joint_blocks.1.x_block.mlp.fc1.bias": None}, r"lacks the tensor transformer_blocks\.1\.ff\.net"),
        ({f"{X}joint_blocks.1.x_block.mlp.fc1.bias": (3,)}, r"net\.0\.proj\.bias has shape \[3\]"),
        ({f"{X}joint_blocks.7.x_block.mlp.fc1.bias": (3,)}, "1 tensors that its config.json has no place for"),
        ({f"{X}x_embedder.proj.weight": (3,)}, "has tensors of unexpected shapes"),
        ({f"{X}pos_embed": (7,)}, "has tensors of unexpected shapes"),
        ({f"{X}y_embedder.mlp.0.weight": None}, r"lacks the tensor model\.diffusion_model\.y_embedder\.mlp\.0\.weight"),
        ({f"{X}joint_blocks.0.x_block.attn.qkv.weight.absmax": (1,)}, "is of a model quantised with scales of its own"),
        ({"first_stage_model.decoder.conv_in.weight": (64, 4, 3, 3)}, "of 16 latent channels and an autoencoder of 4"),
        ({"first_stage_model.decoder.mid.attn_1.q.bias": None}, r"lacks the tensor first_stage_model\.decoder\.mid"),
        ({"first_stage_model.decoder.mid.block_9.bias": (1,)}, "1 tensors that a model of the family sd3 has no place"),
    ],
)  # fmt: skip
def test_whole_checkpoints_that_do_not_fit(changes, sentence, whole, tmp_path):
    tensors = dict(whole[2])
    for name, shape in changes.items():
        tensors = {n: x for n, x in tensors.items() if not n.startswith(name)}
        tensors |= {} if shape is None else {name: np.zeros(shape, np.float32)}
    save_file(tensors, tmp_path / "all.safetensors")
    with pytest.raises((ConfigError, WeightsError), match=rf"all\.safetensors.*{sentence}"):
        jaxdiff.load(tmp_path / "all.safetensors")


def test_a_whole_checkpoint_cut_short(whole, tmp_path):
    save_file(whole[2], tmp_path / "all.safetensors")
    content = (tmp_path / "all.safetensors").read_bytes()
    for length in (len(content) - 1, len(content) // 2, 1000, 9):
        (tmp_path / "cut.safetensors").write_bytes(content[:length])
        with pytest.raises(WeightsError, match=r"cut\.safetensors is damaged or not a safetensors file"):
            jaxdiff.load(tmp_path / "cut.safetensors")


def test_a_transformer_is_not_saved_in_one_file(made_transformers, tmp_path):
    with pytest.raises(WeightsError, match="cannot hold a model with a transformer: save a folder"):
        jaxdiff.save(tmp_path / "x.safetensors", *made_transformers.model("sd3"))
