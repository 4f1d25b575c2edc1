"""Upscaling networks: the same numbers as PyTorch, from every layout of their files."""

import jax
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

import jaxdiff
from jaxdiff.errors import WeightsError
from jaxdiff.io.upscaler import FOLDER, bundled_upscalers, open_upscaler, save_upscaler
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


@pytest.mark.slow
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
        ({"body.0.weight": (8, 3, 3, 3)}, "not a network of residual-in-residual dense blocks"),
        ({"model.0.weight": (8, 3, 3, 3), "model.2.weight": (8, 8, 3, 3)}, "not a network of residual-in-residual"),
        ({"conv_first.weight": (8, 1, 3, 3), "body.0.rdb1.conv1.weight": (4, 8, 3, 3)}, "takes 1 channels"),
        ({"conv_first.weight": (8, 48, 3, 3), "body.0.rdb1.conv1.weight": (4, 8, 3, 3)}, "cannot be built"),
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


# --- the network that ships


def drawing(seed: int) -> Image.Image:
    """Flat shapes with smooth edges, 128 x 128."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (512, 512), tuple(rng.integers(150, 256, 3)))
    draw = ImageDraw.Draw(image)
    for _ in range(8):
        x, y, size = rng.integers(20, 360, 3)
        colour = tuple(int(c) for c in rng.integers(0, 256, 3))
        draw.ellipse((x, y, x + size // 2, y + 80), fill=colour, outline=(20, 20, 20), width=12)
        draw.line((y, x, 500 - x, size), fill=colour, width=20)
    return image.resize((128, 128), Image.Resampling.LANCZOS)


def test_the_bundled_network_enlarges_drawings_better_than_lanczos():
    upscaler = jaxdiff.load_upscaler()
    originals = [drawing(seed) for seed in range(4)]
    small = [image.resize((32, 32), Image.Resampling.BICUBIC) for image in originals]
    plain = [x.resize((128, 128), Image.Resampling.LANCZOS) for x in small]
    made = jaxdiff.upscale(*upscaler, np.stack([np.asarray(x) for x in small]))

    def decibels(images):
        errors = np.stack([np.asarray(x) for x in images]) - np.stack([np.asarray(x, float) for x in originals])
        return -10 * np.log10((errors**2).mean((1, 2, 3)) / 255**2)

    assert (decibels(made) - decibels(plain)).min() > 0.5


def test_the_bundled_network_leaves_no_seams():
    """It could see twice as far as the margin of a tile; what it sees there makes no grey level."""
    upscaler = jaxdiff.load_upscaler()
    image = np.asarray(drawing(9))
    whole, tiled = (jaxdiff.upscale(*upscaler, image, tile=tile).astype(int) for tile in (128, 32))
    assert np.abs(whole - tiled).max() <= 1


def test_what_ships_is_small_and_says_where_it_comes_from():
    assert bundled_upscalers() == ["icons"]
    file = FOLDER / "icons.safetensors"
    assert file.stat().st_size < 20e6
    assert "## Sources and licence" in (FOLDER / "README.md").read_text(encoding="utf-8")
