"""A custom scheduler in 20 lines, compared with DDIM at the same cost.

    python examples/custom_scheduler.py [OUTPUT.png]

It is second-order DEIS (Zhang & Chen 2023, "Fast Sampling of Diffusion Models with Exponential Integrator"): in
x / alpha the process is d(x / alpha) = eps d(rho) with rho = sigma / alpha, and eps is extrapolated linearly in
log(rho) from its last two values. DDIM keeps eps constant.

Cost: 59 s on two CPU cores, compilation included; peak memory 0.9 GB.
Expect: after 20 network calls the latents are 0.069 (relative) from those of 250 calls with DEIS, 0.151 with DDIM. The
three images [reference, DEIS, DDIM] can hardly be told apart.
"""

import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxdiff
from jaxdiff.io.images import strip, write_png


class State(NamedTuple):
    x: jax.Array  # [B, ...]
    denoised: jax.Array
    eps: jax.Array  # of the step before


def deis():
    def step(denoise, state, times, i, keys):
        previous, current, next_time = (
            jax.tree.map(lambda a, j=j: a[j], times) for j in (jnp.maximum(i - 1, 0), i, i + 1)
        )
        x0 = denoise(state.x, current)
        eps = (state.x - current.alpha * x0) / current.sigma
        rho_previous, rho, rho_next = (t.sigma / t.alpha for t in (previous, current, next_time))
        # The integral of log(r / rho) over r from rho to rho_next, which may be 0.
        area = jax.scipy.special.xlogy(rho_next, rho_next / rho) - (rho_next - rho)
        bend = jnp.where(i > 0, area / jnp.log(rho_previous / rho), 0.0)
        x = next_time.alpha * x0 + next_time.sigma * eps + next_time.alpha * bend * (state.eps - eps)
        return State(x, x0, eps)

    return jaxdiff.Scheduler(lambda x: State(x, x, x), step)


def main(output="custom_scheduler.png", prompt="a castle", steps=20, reference_steps=250, seed=0):
    """Write [reference, deis, ddim]; returns each method's relative error against the reference's latents."""
    model, params = jaxdiff.load("icons")
    tokens, empty = (jaxdiff.tokenize(model, [text]) for text in (prompt, ""))
    key = jax.random.key(seed)
    noise = jaxdiff.initial_noise(key[None], (16, 16, model.unet.config.in_channels))

    def draw(scheduler, steps):
        times, _ = jaxdiff.time_grid(model.scheduler, steps, "dpmpp_2m", "karras")  # one grid, from unit noise, for all

        @jax.jit
        def latents(params):
            cond, uncond = (jaxdiff.encode_text(model, params, ids) for ids in (tokens, empty))
            denoise = jaxdiff.denoiser(model, params, cond, uncond, 2.0)
            return jaxdiff.sample(denoise, noise, times, scheduler, key)

        return latents(params)

    drawn, errors = [draw(jaxdiff.get_scheduler("dpmpp_2m"), reference_steps)], {}
    for name, scheduler in (("deis", deis()), ("ddim", jaxdiff.get_scheduler("ddim"))):
        drawn.append(draw(scheduler, steps))
        errors[name] = float(jnp.linalg.norm(drawn[-1] - drawn[0]) / jnp.linalg.norm(drawn[0]))
        print(f"{name}, {steps} network calls: {errors[name]:.4f} from the reference of {reference_steps}")
    write_png(output, strip(np.asarray(jaxdiff.decode(model, params, jnp.concatenate(drawn)))))
    return errors


if __name__ == "__main__":
    main(*sys.argv[1:2])
