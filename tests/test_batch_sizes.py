"""Into which batches sample.py divides images: of one size, few sizes for all runs, and little in vain."""

import itertools
import math

import pytest

from jaxdiff.cli import flags, sample
from jaxdiff.cli.requests import MAX_PADDING, batch_size, prompt_lines
from jaxdiff.io.images import read_metadata
from jaxdiff.sampling.generate import sampler

MOST = 4  # images a device


def in_vain(groups: list[int], devices: int, size: int) -> float:
    """The part of what the busiest device draws that it would not have to draw at one image at a time."""
    each = math.ceil(size / devices)
    drawn = each * sum(math.ceil(count / size) for count in groups)
    return 1 - sum(math.ceil(count / devices) for count in groups) / drawn


@pytest.mark.parametrize("devices", [1, 4, 8])
def test_any_number_of_images_has_batches_of_few_sizes_that_are_nearly_full(devices):
    sizes = {count: batch_size([count], devices, MOST) for count in range(1, 400)}
    powers = {2**i for i in range(int(math.log2(devices)) + 1)}
    assert set(sizes.values()) <= powers | {devices * each for each in range(1, MOST + 1)}
    assert max(in_vain([count], devices, size) for count, size in sizes.items()) <= MAX_PADDING


def test_one_device_draws_equal_batches_as_few_as_there_can_be():
    for count in range(1, 400):
        batches = math.ceil(count / MOST)
        assert batch_size([count], 1, MOST) == math.ceil(count / batches)


def test_groups_of_images_that_share_no_batch_are_not_filled_up_with_copies():
    """As of prompts that name LoRAs: one image each, many and one, and all sizes together."""
    assert batch_size([1] * 7, 1) == 1
    assert batch_size([40, 1], 1) == 4
    for groups in itertools.product((1, 2, 3, 5, 9), repeat=3):
        for devices in (1, 8):
            assert in_vain(list(groups), devices, batch_size(groups, devices)) <= MAX_PADDING


def test_groups_are_found_by_the_loras_that_prompts_name(tmp_path):
    for name in ("ink", "detail"):
        (tmp_path / f"{name}.safetensors").touch()
    prompts = ["a <lora:ink:1>", "b <lora:ink:1>", "c", "d <lora:detail:1>"]
    f = flags.parse(["sample.py", *(f"--prompt={p}" for p in prompts), f"--lora_dir={tmp_path}"])
    assert sample.image_groups(f, prompt_lines(f)) == [2, 1, 1]
    f = flags.parse(["sample.py", *(f"--prompt={p}" for p in prompts), "--num_images=2"])
    assert sample.image_groups(f, prompt_lines(f)) == [8]


@pytest.mark.slow
def test_a_run_compiles_one_program_for_all_its_batches(sample_cli, compilations):
    """Five images, as three and two; and as many again draw with it."""
    sampler.cache_clear()
    code, out, err = sample_cli("--prompt=a castle", "--num_images=5", "--steps=1", "--output=o")
    assert (code, len(out)) == (0, 5), err
    assert read_metadata(out[0])["batch_size"] == 3
    assert sum("program" in name for name in compilations) == 1
    code, out, err = sample_cli("--prompt=a castle", "--num_images=6", "--steps=1", "--output=p")
    assert (code, len(out)) == (0, 6), err
    assert sum("program" in name for name in compilations) == 1
