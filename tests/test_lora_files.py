"""LoRAs as files of peft and of programs that bundle embeddings: strength by a config beside, folders, words."""

import json
import re

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxdiff.config import ConfigError
from jaxdiff.errors import WeightsError
from jaxdiff.io.lora import bundled_words, load_bundled, load_lora, read_lora
from jaxdiff.io.tensor_files import named_tensors
from jaxdiff.io.torch_names import current_name
from tests.support.lora_files import drawn_params, full, kohya, matrices, merge, peft, small_model, written


@pytest.fixture(scope="module")
def sd1():
    model = small_model()
    return model, drawn_params(model)


@pytest.fixture(scope="module")
def sdxl():
    model = small_model("sdxl", "openclip")
    return model, drawn_params(model)


@pytest.mark.parametrize("name", ["default", "default_0", "my-style"])
def test_names_of_adapters_within_names_of_tensors(name, sd1, tmp_path):
    """As peft's own state_dict has them."""
    model, params = sd1
    found = matrices(params, r"attn1\.to_q|layers\.0\..*q_proj")
    expected = read_lora(model, written(tmp_path / "a.safetensors", peft, found))

    def named(*parts):
        return {re.sub(r"\.weight$", f".{name}.weight", tensor): x for tensor, x in peft(*parts).items()}

    ours = read_lora(model, written(tmp_path / "b.safetensors", named, found))
    jax.tree.map(np.testing.assert_array_equal, dict(ours), dict(expected))


PEFT = {  # by network, settings of peft's LoraConfig
    "unet": {
        "target_modules": ["to_q", "to_v", "conv1", "proj_in", "time_emb_proj"],
        "r": 4,
        "lora_alpha": 32,
        "rank_pattern": {r"attn1\.to_q": 2, "conv1": 3},
        # Of several that match, the first counts; a pattern may be any regular expression.
        "alpha_pattern": {r".*attn2\.to_v": 7, "to_v": 5, r"^down_blocks.*conv1": 9},
    },
    "text_encoder": {"target_modules": ["q_proj", "fc1"], "r": 2, "lora_alpha": 32, "use_rslora": True},
    "text_encoder_2": {"target_modules": ["q_proj", "fc2"], "r": 3, "lora_alpha": 5, "use_dora": True},
}
# Of which patterns fit, peft's names of the layers decide: transformers 5.6 calls a text encoder's `encoder.layers…`,
# that of its variant with a projection, as the versions before both, `text_model.encoder.layers…`.
FIRST = "encoder.layers.0.self_attn.q_proj"
PATTERNS = {
    "plain": {"rank_pattern": {FIRST: 3}, "alpha_pattern": {FIRST: 7}},
    "text_model": {"rank_pattern": {f"text_model.{FIRST}": 3}, "alpha_pattern": {f"text_model.{FIRST}": 7}},
    "only alpha": {"alpha_pattern": {f"text_model.{FIRST}": 7}},
    "anchored": {"rank_pattern": {f"^{FIRST}": 3}, "alpha_pattern": {f"^{FIRST}": 7, "q_proj": 5}},
    "expression": {"rank_pattern": {r".*layers\.[01].*_proj": 3}, "alpha_pattern": {r"model\.enc.*fc1": 7, "fc1": 2}},
}


def peft_folder(folder, name, network, settings=None):
    """A folder that peft writes for one of the small networks, and the merged weights by PyTorch's names."""
    import peft as library
    import torch

    from tests.support import oracle

    found = oracle.unet(network) if name == "unet" else oracle.text(network)
    found = library.get_peft_model(found, library.LoraConfig(**(settings or PEFT[name]), init_lora_weights=False))
    with torch.no_grad():
        for key, x in found.named_parameters():
            if "lora_magnitude_vector" in key:
                x *= torch.linspace(0.5, 1.5, x.numel()).reshape(x.shape)
    found.save_pretrained(folder)
    return {current_name(n): x.numpy() for n, x in found.merge_and_unload().state_dict().items()}


def assert_merged(params, before, theirs):
    changed = 0
    old = dict(named_tensors(before))
    for name, x in named_tensors(params):
        changed += np.abs(x - old[name]).max() > 1e-3
        np.testing.assert_allclose(x, theirs[name], atol=2e-6, rtol=1e-5, err_msg=name)
    assert changed


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("given", ["folder", "adapter_model.safetensors", "adapter_model.bin"])
def test_peft_files_have_the_strength_of_their_config(given, sdxl, tmp_path):
    """adapter_config.json holds what the tensors do not: alpha and rank by layer, and how they become a scale."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("peft")
    from safetensors.torch import load_file

    model, params = sdxl
    parts = {"unet": "sdxl", "text_encoder": "vit_l", "text_encoder_2": "openclip"}
    theirs = {name: peft_folder(tmp_path / name, name, network) for name, network in parts.items()}
    if given.endswith(".bin"):
        for name in parts:
            file = tmp_path / name / "adapter_model.safetensors"
            torch.save(load_file(file), file.with_suffix(".bin"))
            file.unlink()
    # Which of the two text encoders a file is for, the sub-folder says, or the class that peft wrote down.
    (tmp_path / "text_encoder_2").rename(tmp_path / "te2")
    files = [tmp_path / name / ("" if given == "folder" else given) for name in ("unet", "text_encoder", "te2")]
    merged = merge(params, [read_lora(model, file) for file in files])
    (tmp_path / "te2").rename(tmp_path / "text_encoder_2")
    whole = merge(params, read_lora(model, tmp_path))
    for name in parts:
        assert_merged(merged[name], params[name], theirs[name])
        jax.tree.map(np.testing.assert_array_equal, merged[name], whole[name])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("patterns", PATTERNS)
def test_patterns_of_peft_match_the_names_of_its_layers(patterns, sdxl, tmp_path):
    """Its text encoders with and without `text_model.` before their layers' names, in the file and in the patterns."""
    pytest.importorskip("torch")
    pytest.importorskip("peft")
    model, params = sdxl
    settings = {"target_modules": ["q_proj", "fc1"], "r": 2, "lora_alpha": 8} | PATTERNS[patterns]
    for name, network in {"text_encoder": "vit_l", "text_encoder_2": "openclip"}.items():
        theirs = peft_folder(tmp_path / name, name, network, settings)
        assert_merged(merge(params, read_lora(model, tmp_path / name))[name], params[name], theirs)


@pytest.mark.parametrize("written", ["", "text_model."])
@pytest.mark.parametrize("pattern", ["", "text_model."])
def test_patterns_of_a_file_of_any_version_of_transformers(pattern, written, sd1, tmp_path, caplog):
    """The ranks tell which of the two names was meant; without them peft's rule holds, and a warning says so."""
    model, params = sd1
    path = peft_file(tmp_path / "a", params, within=written)
    key = f"{pattern}encoder.layers.0.self_attn.q_proj"

    def alphas(**patterns):
        (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({"lora_alpha": 8, **patterns}))
        return [f.alpha for _, f in sorted(read_lora(model, path).items())]

    fits = not pattern or bool(written)
    assert alphas(r=3, alpha_pattern={key: 7})[0] == (7 if fits else 8)
    assert ("as in peft, it changes nothing" in caplog.text) != fits
    assert alphas(r=4, rank_pattern={f"{pattern}.*": 3}, alpha_pattern={f"{pattern}.*layers.0.*": 7})[0] == 7


def peft_file(folder, params, config=None, name="adapter_model", within="text_model."):
    """A text encoder's LoRA of rank 3 in peft's names, with such a config beside it or none."""
    folder.mkdir(exist_ok=True)
    tensors = {}
    for _, layer, down, up in matrices(params, "q_proj", only=("text_encoder",)):
        stem = f"base_model.model.{within}{layer}"
        tensors |= {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
    save_file(tensors, folder / f"{name}.safetensors")
    if config is not None:
        (folder / "adapter_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return folder / f"{name}.safetensors"


def test_config_beside_a_text_encoders_adapter(sd1, tmp_path, caplog):
    model, params = sd1
    for name in ("adapter_model", "style"):
        lora = read_lora(
            model, peft_file(tmp_path / "a", params, {"peft_type": "LORA", "r": 3, "lora_alpha": 24}, name)
        )
        assert {f.alpha for f in lora.values()} == {24.0}
    off = read_lora(model, peft_file(tmp_path / "off", params, {"lora_alpha": 0, "use_qalora": False, "r": 3}))
    assert {f.alpha for f in off.values()} == {0.0}
    assert {layer.partition(".")[0] for layer in lora} == {"text_encoder"}
    assert not caplog.records
    lora = read_lora(model, peft_file(tmp_path / "b", params))
    assert {f.alpha for f in lora.values()} == {3.0}
    assert "has no adapter_config.json beside it" in caplog.text


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"r": 8, "lora_alpha": 8}, "matrices of rank 3 for .*, its settings say 8: the two do not belong together"),
        ({"peft_type": "HRA"}, "is a HRA adapter by its adapter_config.json"),
        ({"init_lora_weights": "pissa_niter_4"}, r"starts from other weights than the model's \(.* pissa_niter_4\)"),
        ({"use_qalora": True}, "needs use_qalora, which is not supported"),
        ({"alpha_pattern": {"(": 3}}, "has damaged metadata"),
        ({"lora_alpha": "x"}, "has damaged metadata"),
        ({"lora_alpha": float("nan")}, "has damaged metadata"),
        ({"auto_mapping": 3}, "has damaged metadata"),
        ("{", "cannot be read as JSON"),
        ("[]", "holds list, not a JSON object"),
        ({"use_dora": True}, "is a DoRA but lacks the magnitude"),
    ],
)
def test_configs_that_do_not_fit(config, message, sd1, tmp_path):
    with pytest.raises((WeightsError, ConfigError), match=message) as error:
        read_lora(sd1[0], peft_file(tmp_path / "a", sd1[1], config))
    assert "\n" not in str(error.value)


def test_folders_of_loras(sd1, tmp_path):
    model, params = sd1
    with pytest.raises(WeightsError, match=r"holds no LoRA: give its file, such as pytorch_lora_weights\.safetensors"):
        read_lora(model, tmp_path)
    file = peft_file(tmp_path / "style", params, {"r": 3, "lora_alpha": 6})  # peft puts named adapters into sub-folders
    for folder in (tmp_path, file.parent):
        assert {f.alpha for f in read_lora(model, folder).values()} == {6.0}
    peft_file(tmp_path / "other", params, {"r": 3})
    with pytest.raises(WeightsError, match=r"holds several LoRAs \(other/adapter_model.safetensors, style/adapter_m"):
        read_lora(model, tmp_path)
    written(tmp_path / "pytorch_lora_weights.safetensors", peft, matrices(params, "q_proj"))
    assert {f.alpha for f in read_lora(model, tmp_path).values()} == {3.0}


# ---- embeddings beside a LoRA


@pytest.mark.parametrize("names", ["string_to_param", "clip_l", "emb_params"])
def test_an_embedding_beside_a_lora(names, tiny, tmp_path, caplog):
    model, params = tiny
    found = matrices(params, r"attn1\.to_q")
    expected = read_lora(model, written(tmp_path / "a.safetensors", kohya, found))
    rows = np.arange(32, dtype=np.float32).reshape(2, 16)
    inner = {"string_to_param": "string_to_param.*", "clip_l": "clip_l", "emb_params": "emb_params"}[names]

    def bundled(*parts):
        other = {"bundle_emb.bad cat.clip_g": rows, "bundle_emb.out.clip_l": rows, "bundle_emb.out.clip_l_out": rows}
        return kohya(*parts) | {f"bundle_emb.my cat.{inner}": rows} | other

    file = written(tmp_path / "b.safetensors", bundled, found)
    jax.tree.map(np.testing.assert_array_equal, dict(read_lora(model, file)), dict(expected))
    load_lora(model, params, file)
    assert "brings an embedding along, for 'bad cat', 'my cat', 'out'" in caplog.text
    caplog.clear()
    model, params = load_bundled(model, params, file)
    ids = model.tokenizer.added_ids("my cat")
    assert model.tokenizer.encode(["a MY cat"])[0][1:] == ids
    np.testing.assert_array_equal(params["text_encoder"]["embeddings_token_embedding"]["embedding"][ids[0] :], rows)
    assert "has 'bad cat' for text_encoder_2; this model has text_encoder" in caplog.text
    assert "has output embeddings for 'out' (clip_l_out), which are not supported" in caplog.text
    assert bundled_words(model, file) == ["bad cat", "out"]
    again, _ = load_bundled(model, params, file)
    assert again == model


def test_metadata_of_one_network_alone(sd1, tmp_path):
    """As `save_lora_adapter` of a network of diffusers writes it: neither names nor settings say which network."""
    model, params = sd1
    found = matrices(params, r"attn1\.to_[qk]", only=("unet",))

    def bare(module, name, down, up):
        return {tensor.removeprefix("unet."): x for tensor, x in peft(module, name, down, up).items()}

    settings = {"r": 3, "lora_alpha": 6, "alpha_pattern": {"attn1.to_k": 1.5}, "lora_bias": False}
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(settings)}
    lora = read_lora(model, written(tmp_path / "pytorch_lora_weights.safetensors", bare, found, metadata))
    assert {(name.endswith("to_k"), f.alpha) for name, f in lora.items()} == {(True, 1.5), (False, 6.0)}


def base_model(module, name, down, up):
    """As diffusers' trainers of LCM-LoRAs write it: peft's names behind the network's."""
    stem = f"{module}.base_model.model.{full(module, name)}"
    return {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}


def lycoris(module, name, down, up):
    """As LyCORIS calls the layers of whatever network it wraps."""
    stem = f"lycoris_{full(module, name).replace('.', '_')}"
    return {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}


def compiled(module, name, down, up):
    stem = f"{module}._orig_mod.{full(module, name)}"
    return {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}


@pytest.mark.parametrize(
    ("names", "only"),
    [
        *((names, only) for names in (base_model, compiled) for only in ("unet", "text_encoder", "text_encoder_2")),
        *((lycoris, only) for only in ("unet", "text_encoder")),  # of which encoder, only the widths would say
    ],
)
def test_names_of_networks_that_were_wrapped(names, only, sdxl, tmp_path, caplog):
    model, params = sdxl
    found = matrices(params, r"attn1\.to_|q_proj|out_proj", only=(only,))
    expected = read_lora(model, written(tmp_path / "a.safetensors", peft, found))
    ours = read_lora(model, written(tmp_path / "b.safetensors", names, found))
    jax.tree.map(np.testing.assert_array_equal, dict(ours), dict(expected))
    assert ("has no adapter_config.json beside it" in caplog.text) == (names is base_model)
