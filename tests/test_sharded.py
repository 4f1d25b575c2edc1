"""Drawing with parameters that are divided over devices: simulated ones, of one process and of two."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from jaxdiff import parallel
from jaxdiff.models.attention import attention
from tests.support.comparison import levels
from tests.support.processes import finish, free_port, start

LEVEL = 1  # of 255


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """What `tests/support/draw_sharded.py` reports from a process with eight simulated devices."""
    out = tmp_path_factory.mktemp("sharded")
    finish(start("tests.support.draw_sharded", out, devices=8))
    return json.loads((out / "report.json").read_text())


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """The images of all its programs, by name."""
    out = tmp_path_factory.mktemp("images")
    finish(start("tests.support.draw_sharded", out, "all", devices=8))
    return dict(np.load(out / "images.npz"))


@pytest.mark.slow
def test_divided_parameters_draw_the_same_images(images):
    """On 8 devices by fsdp, on 4 x 2 by fsdp and tensor (by sample.py), as on one, and where images are fewer.

    Gathering is exact, so that fsdp computes what whole copies do; tensor adds products in another order. Such float32
    sums differ by some 1e-6 of 1, so that a pixel is rounded to the next of 255 levels at the most.
    """
    for name in ("eight", "fsdp", "commanded"):
        assert levels(images[name], images["one"]) <= LEVEL, name
    assert levels(images["three"], images["one"][:3]) <= LEVEL
    assert levels(images["three_stepwise"], images["one"][:3]) <= LEVEL  # drawn in pieces, on 4 x 2


def test_each_device_holds_its_part_of_every_network(sharded):
    """An eighth, and the vectors, which stay whole; also of one file, another autoencoder and a ControlNet."""
    assert sharded["held"].keys() == {"text_encoder", "unet", "vae"}
    assert sharded["opened"]["held"].keys() == {*sharded["held"], "controlnet"}
    for name, (whole, each) in [*sharded["held"].items(), *sharded["opened"]["held"].items()]:
        assert whole / 8 <= each < whole / 6, name


def test_parameters_go_to_their_devices_as_they_are_read(sharded):
    assert sharded["opened"]["all_over_the_mesh"]


@pytest.mark.parametrize("name", ["fsdp", "both"])
def test_only_parameters_are_gathered_and_each_step_anew(sharded, name):
    """To the byte those that draw, the UNet's inside the loop; of the batch nothing is sent.

    Over tensor there are the sums of pairs of layers, and what the two halves of gated layers change places by.
    """
    found = sharded[name]
    assert found["sent"].pop("all-gather fsdp") == found["divided"]
    assert found["gathered_each_step"] == found["of_the_unet"] > 0
    assert set(found["sent"]) == (set() if name == "fsdp" else {"all-reduce tensor", "collective-permute tensor"})


@pytest.mark.slow
def test_a_mesh_of_two_processes_draws_the_images_of_one(images, tmp_path):
    """`generate` on both, which each get all the images: with divided parameters, with copies, and by devices."""
    port = free_port()
    files = [tmp_path / f"{i}.npz" for i in range(2)]
    finish(*(start("tests.support.draw_on_hosts", file, port, i, devices=2) for i, file in enumerate(files)))
    for drawn in map(np.load, files):
        assert set(drawn) == {"divided", "copied", "devices"}
        for name, found in drawn.items():
            assert levels(found, images["one"][: len(found)]) <= LEVEL, name


def test_a_tpus_attention_kernel_takes_each_devices_heads():
    """The compiler divides the heads over tensor; a kernel, which it does not know, must be told."""
    mesh = AbstractMesh((2, 2, 2), parallel.AXES, axis_types=parallel.AXIS_TYPES)
    rows = PartitionSpec(parallel.EXAMPLES)
    how = {"in_specs": rows, "out_specs": rows, "axis_names": {*parallel.EXAMPLES}, "check_vma": False}  # as `pmap`
    drawing = jax.shard_map(lambda x: attention(x, x, x, heads=4), mesh=mesh, **how)
    text = str(jax.make_jaxpr(drawing)(jax.ShapeDtypeStruct((4, 1024, 256), jnp.bfloat16)))
    assert re.search(r"bf16\[1,2,1024,64\] = pallas_call", text)  # one of 4 images, two of 4 heads
