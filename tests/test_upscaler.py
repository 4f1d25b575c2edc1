"""Upscaling networks: the same numbers as PyTorch, from every layout of their files."""

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

import jaxdiff
from jaxdiff.errors import WeightsError
from jaxdiff.io.upscaler import open_upscaler, save_upscaler
from tests.support.rrdb_oracle import TorchRRDBNet, first_names, later_names


def network(blocks=2, features=8, grow=4, scale=4):
    torch.manual_seed(0)
    return TorchRRDBNet(blocks, features, grow, scale).eval()


def both(net, path, size=(6, 10)):
    """What PyTorch and jaxdiff make of one image, [1, H, W, 3] each."""
    image = np.random.default_rng(0).random((1, *size, 3), np.float32)
    with torch.no_grad():
        expected = net(torch.from_numpy(image).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy()
    module, params = jaxdiff.load_upscaler(path)
    with jax.disable_jit():
        found = module.apply({"params": params}, image)
    return expected, np.asarray(found), module.config


@pytest.mark.parametrize("scale", [4, 2, 1])
@pytest.mark.parametrize("group", ["params_ema", "params", None])
def test_a_network_equals_pytorch(tmp_path, scale, group):
    net = network(scale=scale)
    state = net.state_dict()
    if group == "params_ema":  # the average counts, not the latest beside it
        state = {"params": {name: x + 1 for name, x in state.items()}, "params_ema": state}
    elif group:
        state = {group: state}
    torch.save(state, tmp_path / "net.pth")
    expected, found, config = both(net, tmp_path / "net.pth", (8, 12))
    assert (config.scale, config.num_block, config.num_feat, config.num_grow_ch) == (scale, 2, 8, 4)
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("renamed", [first_names, later_names])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_older_names_open(tmp_path, renamed, suffix):
    net, path = network(), tmp_path / f"net{suffix}"
    state = {name: x.contiguous() for name, x in renamed(net.state_dict()).items()}
    assert not {"conv_up1.weight", "body.0.rdb1.conv1.weight"} & set(state)
    torch.save(state, path) if suffix == ".pth" else save_torch(state, path)
    expected, found, _ = both(net, path)
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("blocks", "scale"), [(23, 4), (6, 4), (23, 2)])
def test_published_sizes_are_read_from_the_tensors(tmp_path, blocks, scale):
    """RealESRGAN_x4plus, x4plus_anime_6B and x2plus: every tensor has a place, none is left over."""
    with torch.device("meta"):
        shapes = {name: tuple(x.shape) for name, x in TorchRRDBNet(blocks, scale=scale).state_dict().items()}
    save_file({name: np.zeros(shape, np.float16) for name, shape in shapes.items()}, tmp_path / "net.safetensors")
    module, params = jaxdiff.load_upscaler(tmp_path / "net.safetensors", dtype="float16")
    c = module.config
    assert (c.num_block, c.num_feat, c.num_grow_ch, c.scale) == (blocks, 64, 32, scale)
    assert sum(x.size for x in jax.tree.leaves(params)) == sum(np.prod(shape) for shape in shapes.values())


def test_a_network_saved_opens_in_pytorch(tmp_path):
    net = network()
    torch.save(net.state_dict(), tmp_path / "net.pth")
    _, params = jaxdiff.load_upscaler(tmp_path / "net.pth")
    save_upscaler(tmp_path / "again.safetensors", params)
    from safetensors.torch import load_file

    net.load_state_dict(load_file(tmp_path / "again.safetensors"))  # strictly
    expected, found, _ = both(net, tmp_path / "again.safetensors")
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"body.0.weight": (8, 3, 3, 3)}, "no network of residual-in-residual dense blocks"),
        ({"model.0.weight": (8, 3, 3, 3), "model.2.weight": (8, 8, 3, 3)}, "no network of residual-in-residual"),
        ({"conv_first.weight": (8, 1, 3, 3), "body.0.rdb1.conv1.weight": (4, 8, 3, 3)}, "takes 1 channels"),
        ({"conv_first.weight": (8, 48, 3, 3), "body.0.rdb1.conv1.weight": (4, 8, 3, 3)}, "none that can be built"),
    ],
)
def test_another_architecture_is_refused(tmp_path, tensors, said):
    path = tmp_path / "net.safetensors"
    save_file({name: np.zeros(shape, np.float32) for name, shape in tensors.items()}, path)
    with pytest.raises(WeightsError, match=said) as e:
        open_upscaler(path)
    assert str(path) in str(e.value)
    assert str(e.value).count("\n") == 0


def test_a_missing_tensor_or_file_is_named(tmp_path):
    state = network().state_dict()
    del state["body.1.rdb2.conv3.bias"]
    torch.save(state, tmp_path / "net.pth")
    with pytest.raises(WeightsError, match=r"lacks the tensor body.1.rdb2.conv3.bias"):
        jaxdiff.load_upscaler(tmp_path / "net.pth")
    state = {**network().state_dict(), "extra.weight": torch.zeros(2)}
    torch.save(state, tmp_path / "net.pth")
    with pytest.raises(WeightsError, match=r"holds 1 tensors beside a network of 2 blocks, such as extra.weight"):
        open_upscaler(tmp_path / "net.pth")
    state = {**network().state_dict(), "conv_hr.weight": torch.zeros(8, 4, 3, 3)}
    torch.save(state, tmp_path / "net.pth")
    with pytest.raises(
        WeightsError, match=r"conv_hr.weight has shape \[8, 4, 3, 3\], and a network of 2 blocks \[8, 8"
    ):
        open_upscaler(tmp_path / "net.pth")
    with pytest.raises(WeightsError, match="neither a file nor a bundled upscaler"):
        jaxdiff.load_upscaler(tmp_path / "none.pth")
    (tmp_path / "folder").mkdir()
    with pytest.raises(WeightsError, match=r"without upscaler.safetensors"):
        jaxdiff.load_upscaler(tmp_path / "folder")
