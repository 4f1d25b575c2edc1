"""Files of tensors in every format read alike, and what is fetched from the hub."""

import inspect
import json

import ml_dtypes
import numpy as np
import pytest
from flax.serialization import msgpack_serialize
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save_file

from jaxdiff.config import ConfigError
from jaxdiff.errors import WeightsError
from jaxdiff.io import hub
from jaxdiff.io.model_paths import find
from jaxdiff.io.tensor_files import load_tensors, open_tensors
from jaxdiff.models.model import param_shapes
from tests.support.written import entry, safetensors


def drawn() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    types = (np.float32, np.float64, np.float16, ml_dtypes.bfloat16, np.int64, np.int32, np.int16, np.int8, np.uint8)
    return {f"x.{np.dtype(t)}": (10 * rng.standard_normal((3, 4))).astype(t) for t in types} | {
        "scalar": np.float32(3),
        "empty": np.zeros((0, 3), np.float32),
        "bool": np.array([True, False]),
    }


def assert_same(source, tensors):
    assert source.shapes == {n: list(x.shape) for n, x in tensors.items()}
    for name, x in tensors.items():
        found = source.read(name)
        assert found.dtype == x.dtype
        np.testing.assert_array_equal(found, x, err_msg=name)


# Formats.


def test_safetensors_in_shards(tmp_path):
    tensors = drawn()
    names = list(tensors)
    places = {n: f"model-{i % 2}.safetensors" for i, n in enumerate(names)}
    for shard in set(places.values()):
        save_file({n: np.asarray(tensors[n]) for n in names if places[n] == shard}, tmp_path / shard)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    assert_same(open_tensors(index), tensors)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({}, "has no weight_map"),
        (
            {"weight_map": {"a": "../../x.safetensors"}},
            r"names '\.\./\.\./x\.safetensors', which is not a weights file",
        ),
        ({"weight_map": {"a": "/etc/passwd"}}, "which is not a weights file beside it"),
        ({"weight_map": {"a": "model.safetensors.index.json"}}, "which is not a weights file beside it"),
        ({"weight_map": {"a": "gone.safetensors"}}, r"gone\.safetensors does not exist"),
        ({"weight_map": {"b": "x.safetensors"}}, r"places the tensor b in x\.safetensors, which lacks it"),
    ],
)
def test_damaged_index(index, message, tmp_path):
    save_file({"a": np.zeros(2)}, tmp_path / "x.safetensors")
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps(index))
    with pytest.raises(WeightsError, match=message):
        open_tensors(path)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
def test_files_of_pytorch(legacy, wrapped, tmp_path):
    """Of 1.6 and later and of before; bare, and as Lightning writes them."""
    torch = pytest.importorskip("torch")

    def tensor(x):
        x = np.asarray(x)
        if x.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(x.astype(np.float32)).bfloat16()
        return torch.from_numpy(x.copy())

    state = {n: tensor(x) for n, x in drawn().items()}
    shared = torch.arange(24.0).reshape(4, 6)
    views = {"columns": shared[:, 1::2], "transposed": shared.T, "tail": shared[2:], "expanded": shared[:1, :1]}
    views["parameter"] = torch.nn.Parameter(shared)
    content = {"state_dict": state | views, "epoch": 3, "hyper_parameters": {"lr": 0.1}} if wrapped else state | views
    torch.save(content, tmp_path / "x.ckpt", _use_new_zipfile_serialization=not legacy)
    views = {n: x.detach().numpy() for n, x in views.items()}
    assert_same(open_tensors(tmp_path / "x.ckpt"), drawn() | views)


def test_state_of_a_module(tmp_path):
    """An ordered dictionary with the modules' versions as its state."""
    torch = pytest.importorskip("torch")
    layer = torch.nn.Linear(2, 3)
    torch.save(layer.state_dict(), tmp_path / "x.bin")
    assert_same(open_tensors(tmp_path / "x.bin"), {n: x.detach().numpy() for n, x in layer.named_parameters()})


def test_reading_maps_the_file_and_no_more(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"x": torch.zeros(1000)}, tmp_path / "x.pt")
    base = open_tensors(tmp_path / "x.pt").read("x")
    while not isinstance(base, np.memmap):
        base = base.base
    assert base.base is not None


def test_folders_of_flax(tiny, tmp_path):
    """The networks of Hugging Face's Flax models: their names, their layouts."""
    model, params = tiny
    for name in ("unet", "vae", "text_encoder"):
        tree = {}
        for path, x in flatten_dict(params[name]).items():
            tree[tuple(FLAX_PATHS.get(part, (part,)) for part in path)] = np.asarray(x)
        tree = {tuple(p for part in path for p in part): x for path, x in tree.items()}
        if name == "text_encoder":
            tree = {("text_model", *path): x for path, x in tree.items()}
        path = tmp_path / f"{name}.msgpack"
        path.write_bytes(msgpack_serialize(unflatten_dict(tree)))
        loaded = flatten_dict(load_tensors(path, param_shapes(model)[name], np.float32))
        for key, x in flatten_dict(params[name]).items():
            np.testing.assert_array_equal(loaded[key], x, err_msg=str(key))


FLAX_PATHS = {  # part of a path here -> in Hugging Face's Flax models, where they differ
    "net_0_proj": ("net_0", "proj"),
    **{f"self_attn_{n}_proj": ("self_attn", f"{n}_proj") for n in ("q", "k", "v", "out")},
    **{f"mlp_{n}": ("mlp", n) for n in ("fc1", "fc2")},
    **{f"embeddings_{n}_embedding": ("embeddings", f"{n}_embedding") for n in ("token", "position")},
    **{f"layers_{i}": ("layers", str(i)) for i in range(3)},
}


@pytest.mark.parametrize("content", [b"", b"\xff" * 40, b"\x81\xa1a\xc7\xff\x01\x93"])
def test_damaged_flax_file(content, tmp_path):
    (tmp_path / "flax_model.msgpack").write_bytes(content)
    with pytest.raises(WeightsError, match=r"flax_model\.msgpack is damaged or not a Flax file"):
        open_tensors(tmp_path / "flax_model.msgpack")


@pytest.mark.parametrize("name", ["x.tflite", "x", "x.onnx"])
def test_unknown_format(name, tmp_path):
    with pytest.raises(WeightsError, match=rf"{name} is in no format known here"):
        open_tensors(tmp_path / name)


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt", "bin", "msgpack"])
def test_missing_file(suffix, tmp_path):
    with pytest.raises(WeightsError, match=rf"x\.{suffix} does not exist"):
        open_tensors(tmp_path / f"x.{suffix}")


@pytest.mark.parametrize("dtype", [np.int64, np.int8, np.bool_])
def test_weights_of_whole_numbers_are_named(dtype, tmp_path):
    save_file({"conv.weight": np.ones((2, 2), dtype)}, tmp_path / "x.safetensors")
    target = {"conv": {"kernel": np.zeros((2, 2), np.float32)}}
    with pytest.raises(
        WeightsError, match=rf"tensor conv\.weight holds {np.dtype(dtype)}, not floating-point numbers: it is"
    ):
        load_tensors(tmp_path / "x.safetensors", target, np.float32)


@pytest.mark.parametrize(("name", "dtype"), [("F8_E4M3", ml_dtypes.float8_e4m3fn), ("F8_E5M2", ml_dtypes.float8_e5m2)])
def test_eight_bit_floats_are_read_as_what_they_stand_for(name, dtype, tmp_path):
    numbers = np.arange(-2, 2, 0.5).astype(dtype)
    (tmp_path / "x.safetensors").write_bytes(safetensors({"conv.weight": entry(0, 8, (2, 4), name)}, numbers.tobytes()))
    target = {"conv": {"kernel": np.zeros((4, 2), np.float32)}}
    found = load_tensors(tmp_path / "x.safetensors", target, np.float32)["conv"]["kernel"]
    np.testing.assert_array_equal(found, numbers.astype(np.float32).reshape(2, 4).T)


# The hub, without a network.

CONFIGS = {"model_index.json", "unet/config.json", "text_encoder/config.json", "tokenizer/vocab.json",
           "tokenizer/merges.txt", "scheduler/scheduler_config.json"}  # fmt: skip
BESIDE = {"README.md", "v1-5.safetensors", "v1-5.ckpt", "safety_checker/model.safetensors", "unet/model.onnx",
          "unet/diffusion_flax_model.msgpack", "vae_1_0/diffusion_pytorch_model.safetensors", "pipeline.py",
          "unet/diffusion_pytorch_model.non_ema.safetensors", "unet/openvino/model.bin"}  # fmt: skip


def weights(end: str) -> set[str]:
    return {f"unet/diffusion_pytorch_model.{end}", f"text_encoder/model.{end}"}


SHARDS = {f"unet/diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)} | {
    "unet/diffusion_pytorch_model.safetensors.index.json"
}


@pytest.mark.parametrize(
    ("there", "variant", "fetched"),
    [
        (weights("safetensors") | weights("fp16.safetensors") | weights("bin"), None, weights("safetensors")),
        (weights("safetensors") | weights("fp16.safetensors") | weights("bin"), "fp16", weights("fp16.safetensors")),
        (weights("fp16.safetensors") | weights("fp16.bin"), None, weights("fp16.safetensors")),
        (weights("bin") | weights("fp16.bin"), None, weights("bin")),
        (weights("fp16.bin"), "fp16", weights("fp16.bin")),
        (weights("safetensors"), "fp16", set()),
        (
            {
                "unet/diffusion_pytorch_model.fp16.safetensors",
                "text_encoder/model.safetensors",
                "text_encoder/model.bin",
            },
            "fp16",
            {"unet/diffusion_pytorch_model.fp16.safetensors", "text_encoder/model.safetensors"},
        ),
        (SHARDS | weights("bin"), None, SHARDS),
    ],
)
def test_hub_gives_a_folder_of_one_set_of_weights(there, variant, fetched, tmp_path, monkeypatch):
    """By the package's own signature and its own filter; as `load` asks, with a revision after the name."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    signature = inspect.signature(huggingface_hub.snapshot_download)
    revisions = set()

    def snapshot_download(*args, **kwargs):
        given = signature.bind(*args, **kwargs).arguments
        assert given["repo_id"] == "owner/name"
        revisions.add(given["revision"])
        for path in huggingface_hub.utils.filter_repo_objects(
            sorted(there | CONFIGS | BESIDE),
            allow_patterns=given["allow_patterns"],
            ignore_patterns=given["ignore_patterns"],
        ):
            (tmp_path / path).parent.mkdir(exist_ok=True)
            (tmp_path / path).touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert find("owner/name@refs/pr/3", variant) == tmp_path
    assert find("owner/name", variant) == tmp_path
    assert revisions == {"refs/pr/3", None}
    assert {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()} == CONFIGS | fetched


@pytest.mark.parametrize("error", [OSError("no route to host"), ValueError("a\nb"), TimeoutError()])
def test_hub_offline(error, monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")

    def offline(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(
        ConfigError, match=r"^owner/name is not a local folder, and it cannot be fetched .*local folder\.$"
    ):
        hub.fetch("owner/name")
