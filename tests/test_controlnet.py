"""ControlNets against diffusers' on the same weights, what they do to the UNet, and their files."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxdiff.config import ConfigError, ControlNetConfig, UNetConfig
from jaxdiff.errors import WeightsError
from jaxdiff.io.controlnet import controlnet_table, load_controlnet, save_controlnet
from jaxdiff.io.original_layout import place
from jaxdiff.io.tensor_files import named_tensors
from jaxdiff.models.controlnet import ControlNet, check_fits, combine, example_inputs, from_unet
from jaxdiff.models.unet import UNet2DConditionModel
from tests.support import networks
from tests.support.comparison import TOLERANCE, drawn, error
from tests.support.published import CONTROLNETS

UNET_ONLY = ("sample_size", "up_block_types")
HINTS = {"conditioning_embedding_out_channels": (8, 16, 16, 32)}
SMALL = {k: v for k, v in networks.UNETS["sd1"].items() if k not in UNET_ONLY} | HINTS
CONFIGS = {  # name -> (of the ControlNet, of a UNet that it fits)
    "sd1": (SMALL, networks.UNETS["sd1"]),
    "sd2": (
        SMALL | {"layers_per_block": 1, "attention_head_dim": (2, 8), "use_linear_projection": True},
        networks.UNETS["sd2"],
    ),
    "sdxl": (
        {k: v for k, v in networks.UNETS["sdxl"].items() if k not in UNET_ONLY} | HINTS,
        networks.UNETS["sdxl"],
    ),
    "sdxl_small": (  # no attention at all, and a single resnet in the middle
        {k: v for k, v in networks.UNETS["sdxl"].items() if k not in UNET_ONLY}
        | HINTS
        | {"down_block_types": ("DownBlock2D",) * 2, "mid_block_type": "UNetMidBlock2D"},
        networks.UNETS["sdxl"],
    ),
    "bgr": (SMALL | {"layers_per_block": 1} | {"controlnet_conditioning_channel_order": "bgr"}, networks.UNETS["sd2"]),
}
SHAPE = (9, 6)  # latents; odd, and not square


def inputs_of(config: dict, seed: int = 0) -> dict[str, np.ndarray]:
    inputs = networks.unet_inputs(config)
    rng = np.random.default_rng(seed)
    inputs["x"] = rng.standard_normal((2, *SHAPE, 4)).astype(np.float32)
    inputs["hint"] = rng.uniform(0, 1, (2, 8 * SHAPE[0], 8 * SHAPE[1], 3)).astype(np.float32)
    return inputs


@pytest.fixture(scope="module")
def small():
    """(controlnet, variables), every weight random."""
    controlnet = ControlNet(ControlNetConfig.from_dict(CONFIGS["bgr"][0]))
    return controlnet, drawn(controlnet, example_inputs(controlnet.config))


def squares(tree) -> float:
    return sum(float((np.asarray(x, np.float64) ** 2).sum()) for x in jax.tree.leaves(tree))


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_residuals_and_what_the_unet_makes_of_them_equal_pytorch(name, tmp_path):
    """Two ControlNets at different scales: the same residuals, and the same output with them, as diffusers."""
    pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    from tests.support import controlnet_oracle

    config, unet_config = CONFIGS[name]
    inputs, other = inputs_of(unet_config), inputs_of(unet_config, 1)["hint"]
    net, unet = controlnet_oracle.controlnet(config), controlnet_oracle.unet(unet_config)
    expected = controlnet_oracle.run(net, unet, inputs, [inputs["hint"], other], [0.75, 0.5])
    net.save_pretrained(tmp_path)
    controlnet, params = load_controlnet(tmp_path)
    args = [inputs[n] for n in ("x", "t", "embeddings")]
    added = [inputs.get(n) for n in ("pooled", "time_ids")]
    ours = UNet2DConditionModel(UNetConfig.from_dict(unet_config))

    @jax.jit
    def residuals(params, hint):
        return controlnet.apply({"params": params}, *args, hint, *added)

    @jax.jit
    def steered(variables, each):
        both = combine(each, [0.75, 0.5])
        return both, ours.apply(variables, *args, *added, residuals=both)

    each = [residuals(params, hint) for hint in (inputs["hint"], other)]
    both, output = steered(drawn(ours, (*args, *added)), each)
    for (down, mid), (their_down, their_mid) in zip([*each, both], expected[:3], strict=True):
        assert max(error(a, b) for a, b in zip([*down, mid], [*their_down, their_mid], strict=True)) < TOLERANCE
    assert error(output, expected[3]) < TOLERANCE


@pytest.mark.slow
def test_fresh_controlnet_of_a_unet_changes_nothing_and_learns(tiny):
    """Zero convolutions (Zhang et al. 2023, section 3.1): before training the output is the UNet's own.

    They are where the gradient starts: theirs is not zero, what lies before them has none yet.
    """
    unet, variables = tiny[0].unet, {"params": tiny[1]["unet"]}
    rng = np.random.default_rng(0)
    x, embeddings = rng.standard_normal((1, 4, 5, 4)), rng.standard_normal((1, 3, 16))
    hint, args = rng.uniform(0, 1, (1, 32, 40, 3)), (x, 500.0, embeddings)
    controlnet, params = from_unet(unet, variables["params"], jax.random.key(0))
    assert params["down_blocks_0"] is variables["params"]["down_blocks_0"]

    def loss(params):
        residuals = controlnet.apply({"params": params}, *args, hint)
        output = unet.apply(variables, *args, residuals=residuals)
        return (output**2).mean(), (residuals, output)

    (_, (residuals, output)), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    assert squares(residuals) == 0
    assert error(output, jax.jit(unet.apply)(variables, *args)) < TOLERANCE  # two programs: rounding alone
    zero_convolutions = [gradient[f"controlnet_down_blocks_{i}"] for i in range(len(residuals[0]))]
    assert all(squares(g) > 0 for g in [*zero_convolutions, gradient["controlnet_mid_block"]])
    assert squares(gradient["down_blocks_0"]) == 0


@pytest.mark.slow
def test_masked_tokens_of_the_text_are_not_there(small):
    """Rounding of sums in another order."""
    net, variables = small
    inputs = inputs_of(CONFIGS["bgr"][1])
    x, t, embeddings, hint = (inputs[name] for name in ("x", "t", "embeddings", "hint"))
    mask = np.repeat([[1.0, 0.0]], len(x), 0).repeat(embeddings.shape[1], 1)
    longer = np.concatenate([embeddings, 3 - embeddings], 1)
    apply = jax.jit(net.apply)
    down, mid = apply(variables, x, t, longer, hint, attention_mask=mask)
    for ours, plain in zip([*down, mid], jax.tree.leaves(apply(variables, x, t, embeddings, hint)), strict=True):
        assert error(ours, plain) < TOLERANCE


def test_scales_are_one_a_sample_or_one_for_all():
    rng = np.random.default_rng(0)
    residuals = [jnp.float32(rng.standard_normal((2, s, s, 3))) for s in (8, 4)], jnp.ones((2, 4, 4, 3))
    down, mid = combine([residuals, residuals], [np.array([1.0, 0.0]), 0.5])
    for ours, plain in zip([*down, mid], [*residuals[0], residuals[1]], strict=True):
        np.testing.assert_allclose(ours, plain * np.array([1.5, 0.5], np.float32)[:, None, None, None], rtol=1e-6)
    bfloat = jax.tree.map(lambda r: r.astype(jnp.bfloat16), residuals)
    assert combine([bfloat], [1.0])[1].dtype == jnp.bfloat16


def test_hint_of_another_size_is_named(small):
    controlnet, variables = small
    inputs = inputs_of(SMALL)
    args = [inputs[n] for n in ("x", "t", "embeddings")]
    with pytest.raises(ValueError, match=r"has shape \[64, 48, 3\], these latents need \[72, 48, 3\]: resize"):
        controlnet.apply(variables, *args, inputs["hint"][:, :64])
    with pytest.raises(ValueError, match=r"has shape \[72, 48, 1\], these latents need \[72, 48, 3\]"):
        controlnet.apply(variables, *args, inputs["hint"][..., :1])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"block_out_channels": (16, 64)}, r"block_out_channels is \(16, 64\), this UNet's is \(32, 64\): take"),
        ({"cross_attention_dim": 32}, "cross_attention_dim is 32, this UNet's is 24"),
        ({"layers_per_block": 1}, "layers_per_block is 1, this UNet's is 2"),
        ({"projection_class_embeddings_input_dim": 68}, "input_dim is 68, this UNet's is None"),
    ],
)
def test_controlnet_of_another_width_is_refused(change, sentence):
    unet = UNetConfig.from_dict(networks.UNETS["sd1"])
    check_fits(ControlNetConfig.from_dict(SMALL), unet)
    with pytest.raises(ConfigError, match=sentence):
        check_fits(ControlNetConfig.from_dict(SMALL | change), unet)


def test_files_round_trip(small, tmp_path):
    controlnet, variables = small
    save_controlnet(tmp_path / "a", controlnet, variables["params"])
    for path in (tmp_path / "a", tmp_path / "a" / "diffusion_pytorch_model.safetensors"):
        again, params = load_controlnet(path)
        assert again == controlnet
        jax.tree.map(np.testing.assert_array_equal, params, variables["params"])
    save_controlnet(tmp_path / "b", again, params)
    save_controlnet(tmp_path / "b", again, params)  # over itself
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert load_controlnet(tmp_path / "b", dtype="bfloat16")[0].dtype == jnp.bfloat16


def test_weights_of_other_names_do_not_hide_those_that_are_saved(small, tmp_path):
    controlnet, variables = small
    other = jax.tree.map(lambda x: x + 1, variables["params"])
    save_controlnet(tmp_path, controlnet, other)
    whole = tmp_path / "diffusion_pytorch_model.safetensors"
    shard = whole.rename(tmp_path / "diffusion_pytorch_model-00001-of-00001.safetensors")
    names = dict.fromkeys(load_file(shard), shard.name)
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    (tmp_path / "README.md").write_text("kept")
    jax.tree.map(np.testing.assert_array_equal, load_controlnet(tmp_path)[1], other)
    save_controlnet(tmp_path, controlnet, variables["params"])
    jax.tree.map(np.testing.assert_array_equal, load_controlnet(tmp_path)[1], variables["params"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "config.json", whole.name]


def test_published_folders_of_other_kinds_open(small, tmp_path):
    """A variant in half precision, and a file of PyTorch's own in place of safetensors."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    controlnet, variables = small
    save_controlnet(tmp_path / "a", controlnet, variables["params"])
    theirs = diffusers.ControlNetModel.from_pretrained(tmp_path / "a")
    theirs.save_pretrained(tmp_path / "bin", safe_serialization=False)
    theirs.to(torch.float16).save_pretrained(tmp_path / "half", variant="fp16")
    for path, kwargs in ((tmp_path / "bin", {}), (tmp_path / "half", {"variant": "fp16"}), (tmp_path / "half", {})):
        again, params = load_controlnet(path, **kwargs)
        assert again == controlnet
        # float16 keeps 11 bits, or steps of 2**-24 near zero.
        exact = path.name == "bin"
        for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(variables["params"]), strict=True):
            np.testing.assert_allclose(a, b, rtol=0 if exact else 2**-11, atol=0 if exact else 2**-25)


def as_original(controlnet: ControlNet, params, prefix: str) -> dict[str, np.ndarray]:
    """The tensors under the names of the original layout."""
    table = controlnet_table(controlnet.config)
    return {place(name, table, prefix).name: tensor for name, tensor in named_tensors(params)}


@pytest.mark.parametrize(
    ("prefix", "change"),
    [
        ("control_model.", {"attention_head_dim": 8}),
        ("", {"attention_head_dim": 1, "use_linear_projection": True, "layers_per_block": 1}),
    ],
)
def test_original_layout_opens(prefix, change, tmp_path):
    """As PyTorch diffusers renames it; the config from the tensors alone; the rest of a model beside it is left."""
    controlnet = ControlNet(ControlNetConfig.from_dict(SMALL | {"norm_num_groups": 32} | change))
    params = drawn(controlnet, example_inputs(controlnet.config))["params"]
    tensors = as_original(controlnet, params, prefix)
    beside = {"model.diffusion_model.out.2.bias": np.zeros(4, np.float32)} if prefix else {}
    save_file(tensors | beside, tmp_path / "canny.safetensors")
    opened, read = load_controlnet(tmp_path / "canny.safetensors")
    jax.tree.map(np.testing.assert_array_equal, read, params)
    assert opened.config.to_dict() == controlnet.config.to_dict()
    pytest.importorskip("torch")
    utils = pytest.importorskip("diffusers.loaders.single_file_utils")
    theirs = utils.convert_controlnet_checkpoint(dict(tensors), controlnet.config.to_dict())
    ours = dict(named_tensors(params))
    assert set(theirs) == set(ours)
    for name, tensor in ours.items():
        np.testing.assert_array_equal(tensor, theirs[name])


def test_bad_files_in_the_original_layout_end_in_one_sentence(tmp_path):
    controlnet = ControlNet(ControlNetConfig.from_dict(SMALL | {"norm_num_groups": 32, "attention_head_dim": 8}))
    tensors = as_original(controlnet, drawn(controlnet, example_inputs(controlnet.config))["params"], "")

    def opened(**changes):
        changed = {k: v for k, v in (tensors | changes).items() if v is not None}
        save_file(changed, tmp_path / "canny.safetensors")
        load_controlnet(tmp_path / "canny.safetensors")

    with pytest.raises(WeightsError, match=r"canny.safetensors lacks the tensor controlnet_mid_block.weight"):
        opened(**{"middle_block_out.0.weight": None})
    with pytest.raises(WeightsError, match=r"canny.safetensors holds 1 tensors .* first input_blocks.0.surplus"):
        opened(**{"input_blocks.0.surplus": np.zeros(3, np.float32)})
    with pytest.raises(WeightsError, match=r"canny.safetensors lacks the tensor input_blocks.0.0.weight"):
        opened(**{"input_blocks.0.0.weight": None})
    with pytest.raises(WeightsError, match=r"canny.safetensors has tensors of unexpected shapes"):
        opened(**{"input_hint_block.0.weight": np.zeros(3, np.float32)})
    with pytest.raises(WeightsError, match=r"controlnet_down_blocks.1.weight has shape \[3, 3, 1, 1\]"):
        opened(**{"zero_convs.1.0.weight": np.zeros((3, 3, 1, 1), np.float32)})


def test_pytorch_opens_what_was_saved(small, tmp_path):
    pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    controlnet, variables = small
    save_controlnet(tmp_path / "a", controlnet, variables["params"])
    theirs = diffusers.ControlNetModel.from_pretrained(tmp_path / "a")
    theirs.save_pretrained(tmp_path / "b")
    again, params = load_controlnet(tmp_path / "b")
    jax.tree.map(np.testing.assert_array_equal, params, variables["params"])
    assert again == controlnet


def test_bad_files_end_in_one_sentence(small, tmp_path):
    controlnet, variables = small
    good = tmp_path / "good"
    save_controlnet(good, controlnet, variables["params"])

    def broken(name: str, **changes) -> str:
        folder = shutil.copytree(good, tmp_path / name)
        values = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(values))
        return str(folder)

    with pytest.raises(ConfigError, match="no-such does not exist: give a ControlNetModel folder"):
        load_controlnet(tmp_path / "no-such")
    with pytest.raises(
        ConfigError, match=r"config.json describes a UNet2DConditionModel, but ControlNetModel is needed"
    ):
        load_controlnet(broken("unet", _class_name="UNet2DConditionModel"))
    with pytest.raises(ConfigError, match=r"config.json does not describe a ControlNetModel"):
        load_controlnet(broken("levels", down_block_types=["DownBlock2D"] * 5))
    with pytest.raises(ConfigError, match=r"global_pool_conditions is not supported"):
        load_controlnet(broken("pooled", global_pool_conditions=True))
    with pytest.raises(WeightsError, match=r"has shape .* its config.json calls for"):
        load_controlnet(broken("width", cross_attention_dim=16))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("kept")
    with pytest.raises(WeightsError, match=r"other exists and is not the folder of a network"):
        save_controlnet(tmp_path / "other", controlnet, variables["params"])
    weights = good / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(WeightsError, match=r"diffusion_pytorch_model.safetensors is damaged"):
        load_controlnet(good)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_full_size_shapes_equal_pytorchs(family):
    """Every name and shape of the published sizes; on PyTorch's meta device, without their gigabytes."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    from flax.traverse_util import flatten_dict

    from jaxdiff.io.torch_names import tensor_name, to_torch_layout

    config = CONTROLNETS[family]
    with torch.device("meta"):
        theirs = {k: tuple(v.shape) for k, v in diffusers.ControlNetModel(**config).state_dict().items()}
    module = ControlNet(ControlNetConfig.from_dict(config))
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *example_inputs(module.config))["params"])
    ours = {
        tensor_name(path): to_torch_layout(path, np.broadcast_to(0, leaf.shape)).shape
        for path, leaf in flatten_dict(shapes).items()
    }
    assert ours == theirs
    millions = sum(int(np.prod(s)) for s in ours.values()) / 1e6
    assert round(millions) == {"sd1": 361, "sd2": 364, "sdxl": 1251}[family]


def test_config_of_a_unet_keeps_what_both_have():
    unet = UNetConfig.from_dict(networks.UNETS["sdxl"])
    ours = ControlNetConfig.from_dict(dataclasses.asdict(unet))
    check_fits(ours, unet)
    assert not {"sample_size", "out_channels", "up_block_types"} & set(ours.to_dict())


def test_a_unet_without_a_middle_block_is_steered_by_one_with():
    """diffusers builds no other, and adds what its middle gives to what the UNet has in that place."""
    unet = UNetConfig.from_dict(networks.UNETS["no_middle"])
    ours = ControlNetConfig.from_dict(dataclasses.asdict(unet))
    check_fits(ours, unet)
    assert (unet.mid_block_type, ours.mid_block_type) == (None, "UNetMidBlock2DCrossAttn")
