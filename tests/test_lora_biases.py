"""Changed norms and biases: against peft, and as LyCORIS and ComfyUI name them."""

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxdiff.errors import WeightsError
from jaxdiff.io.lora import merge_lora, read_lora, save_lora
from jaxdiff.io.lora_layers import changeable
from jaxdiff.io.torch_names import tensor_name
from tests.support import networks
from tests.support.lora_files import drawn_params, small_model
from tests.test_lycoris import drawn, merged_weights

NORM, CONV, ATTENTION = "mid_block.resnets.0.norm1", "mid_block.resnets.0.conv1", "mid_block.attentions.0.norm"


@pytest.fixture(scope="module")
def sd1():
    model = small_model()
    return model, drawn_params(model)


@pytest.mark.filterwarnings("ignore")  # peft's own
def test_biases_of_peft_count_alpha_by_rank(sd1, tmp_path):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from tests.support import oracle

    targets = ["proj_in", "conv1"]  # a 1x1 and a 3x3 convolution
    config = peft.LoraConfig(r=4, lora_alpha=3, target_modules=targets, lora_bias=True)
    theirs = peft.get_peft_model(oracle.unet("sd1"), config)
    with torch.no_grad():
        for name, x in theirs.named_parameters():
            if "lora_" in name:
                x.copy_(torch.from_numpy(0.5 * networks.draw(name, tuple(x.shape))))
    theirs.save_pretrained(tmp_path)
    expected = {name: x.detach().numpy() for name, x in theirs.merge_and_unload().named_parameters()}
    lora = read_lora(sd1[0], tmp_path)
    save_lora(tmp_path / "again.safetensors", sd1[0], lora, "kohya")
    for changed in (lora, read_lora(sd1[0], tmp_path / "again.safetensors")):
        found = merged_weights(sd1[1], changed)
        assert len(found) == len(lora) > 8
        assert {name.rpartition(".")[2] for name in found} == {"weight", "bias"}
        for name, x in found.items():
            np.testing.assert_allclose(x, expected[name], rtol=1e-5, atol=1e-5, err_msg=name)


def written(sd1, file) -> dict[str, np.ndarray]:
    """A file that changes a norm and a layer's bias; by parameter, what it adds."""
    known = changeable(sd1[1])
    size, out = known[f"unet.{NORM}"].shape[0], known[f"unet.{CONV}"].shape[-1]
    parts = {
        f"{NORM.replace('.', '_')}.w_norm": drawn(0, size),
        f"{NORM.replace('.', '_')}.b_norm": drawn(1, size),
        f"{CONV.replace('.', '_')}.diff_b": drawn(2, out),
        f"{ATTENTION.replace('.', '_')}.diff": drawn(3, known[f"unet.{ATTENTION}"].shape[0]),
    }
    save_file({f"lora_unet_{name}": x for name, x in parts.items()}, file)
    names = (f"{NORM}.weight", f"{NORM}.bias", f"{CONV}.bias", f"{ATTENTION}.weight")
    return dict(zip(names, parts.values(), strict=True))


def test_norms_and_biases_are_added(sd1, tmp_path):
    model, params = sd1
    added = written(sd1, tmp_path / "a.safetensors")
    lora = read_lora(model, tmp_path / "a.safetensors")
    save_lora(tmp_path / "again.safetensors", model, lora, "kohya")
    before = {}
    for path, x in jax.tree_util.tree_leaves_with_path(params["unet"]):
        if (name := tensor_name(tuple(key.key for key in path))) in added:
            before[name] = np.asarray(x)
    for changed in (lora, read_lora(model, tmp_path / "again.safetensors")):
        found = merged_weights(params, changed)
        assert found.keys() == added.keys()
        for name, x in found.items():
            np.testing.assert_array_equal(x, before[name] + added[name], err_msg=name)
    with pytest.raises(WeightsError, match="the layout diffusers has no place for what changes unet"):
        save_lora(tmp_path / "c.safetensors", model, lora)


def test_scales_of_norms_add_and_have_gradients(sd1, tmp_path):
    model, params = sd1
    added = written(sd1, tmp_path / "a.safetensors")
    lora = read_lora(model, tmp_path / "a.safetensors")
    path = changeable(params)[f"unet.{CONV}.bias"].path

    def bias(scales):
        x = merge_lora(params, [lora, lora], [scales[0], scales[1]])
        for key in path:
            x = x[key]
        return x

    change = added[f"{CONV}.bias"]
    both = jax.jit(bias)(np.array([0.5, 0.25], np.float32))
    none = jax.jit(bias)(np.zeros(2, np.float32))
    np.testing.assert_allclose(both - none, 0.75 * change, rtol=1e-5, atol=1e-6)
    slope = jax.grad(lambda s: bias(s).sum())(np.array([0.5, 0.25], np.float32))
    np.testing.assert_allclose(slope, [change.sum()] * 2, rtol=1e-4, atol=1e-5)
