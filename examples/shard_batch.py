"""A batch of images sharded over your own mesh, here eight devices on two axes.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python examples/shard_batch.py [OUTPUT.png]

Without the flag it uses the devices of the machine. Under `shard_map` each device runs the whole sampler on its own
images, and the program has no communication. (Plain `jit` on sharded arrays draws the same images, but guidance
concatenates its batch along the sharded axis, which makes devices exchange rows at every step.)

Cost: 56 s on two CPU cores that simulate eight devices, compilation of both programs included; peak memory 1.6 GB.
Expect: two rows of four images, one from each device; the largest difference from one device is 7e-6, as float32 sums
in another order make it.
"""

import sys

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

import jaxdiff
from jaxdiff.io.images import grid, write_png

SUBJECTS = ("dog", "cat", "owl", "pig", "fish", "crown", "robot", "castle")


def main(output="shard_batch.png", subjects=SUBJECTS, steps=20, seed=0):
    """Write a sheet; returns the images [B, H, W, 3] of the mesh (as they lie on it) and of one device."""
    model, params = jaxdiff.load("icons")
    prompts = [f"a {subject}" for subject in subjects]
    tokens, empty = (jaxdiff.tokenize(model, texts) for texts in (prompts, [""] * len(prompts)))
    times, noise_scale = jaxdiff.time_grid(model.scheduler, steps, "dpmpp_2m")
    keys = jax.random.split(jax.random.key(seed), len(prompts))  # one an image, so that none depends on its place

    def draw(params, tokens, empty, keys):
        cond, uncond = (jaxdiff.encode_text(model, params, ids) for ids in (tokens, empty))
        denoise = jaxdiff.denoiser(model, params, cond, uncond, 2.0)
        noise = noise_scale * jaxdiff.initial_noise(keys, (16, 16, model.unet.config.in_channels))
        x0 = jaxdiff.sample(denoise, noise, times, jaxdiff.get_scheduler("dpmpp_2m"), keys)
        return jaxdiff.decode(model, params, x0)

    devices = jax.devices()
    mesh = Mesh(np.reshape(devices, (2 if len(devices) % 2 == 0 else 1, -1)), ("rack", "chip"))
    replicated, rows = PartitionSpec(), PartitionSpec(("rack", "chip"))
    specs = {"in_specs": (replicated, rows, rows, rows), "out_specs": rows}
    over_mesh = jax.jit(jax.shard_map(draw, mesh=mesh, check_vma=False, **specs))
    meshed = over_mesh(params, tokens, empty, keys)
    single = jax.jit(draw)(params, tokens, empty, keys)
    shards = {shard.device: shard.data.shape[0] for shard in meshed.addressable_shards}
    print(f"{dict(mesh.shape)}: {list(shards.values())} images on each of {len(shards)} devices")
    print(f"largest difference from one device: {np.abs(np.asarray(meshed) - np.asarray(single)).max():.1e}")
    write_png(output, grid(np.asarray(meshed), columns=4))
    return meshed, single


if __name__ == "__main__":
    main(*sys.argv[1:2])
