"""Error of each scheduler against a reference of 1,000 steps, at equal numbers of network calls: the table of docs.

    python -m benchmarks.bench_schedulers

Eight prompts that the bundled model knows, at guidance 2, one starting noise each, the grids that its config asks
for. The deterministic schedulers solve one equation, whose solution 1,000 steps of dpmpp_2m give; their error is the
root mean square difference of the final latents and of the images. Those that draw noise end elsewhere from the
same start, so that only the spread of their latents is compared: how far its standard deviation is from the
reference's.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np

import jaxdiff
from jaxdiff.diffusion.times import network_calls
from jaxdiff.io.cache import cache_compilations
from jaxdiff.sampling.noise import image_keys, initial_noise
from jaxdiff.sampling.resolve import latent_shape

PROMPTS = (
    "a castle", "a cat", "a fish", "a guitar", "a house", "a penguin", "a star", "a sunflower",
)  # fmt: skip
BUDGETS = (5, 10, 20, 50)  # network calls
STOCHASTIC = ("ddpm", "euler_ancestral", "dpmpp_2m_sde", "dpmpp_sde", "dpmpp_2s_ancestral", "lcm", "tcd")


def steps_of(config, scheduler: str, budget: int) -> int:
    """The most steps that a number of network calls pays for."""
    return max(n for n in range(1, budget + 1) if network_calls(config, n, scheduler) <= budget)


def main() -> None:
    cache_compilations()
    model, params = jaxdiff.load("icons")
    cond, uncond = (
        jax.jit(lambda params, tokens: jaxdiff.encode_text(model, params, tokens))(
            params, jaxdiff.tokenize(model, prompts)
        )
        for prompts in (list(PROMPTS), [""] * len(PROMPTS))
    )
    keys = image_keys(0, len(PROMPTS))
    noise = initial_noise(keys, latent_shape(model, None, None))
    decode = jax.jit(lambda params, x0: jaxdiff.decode(model, params, x0))

    def draw(scheduler: str, steps: int, spacing: str | None = None) -> tuple[np.ndarray, np.ndarray]:
        times, scale = jaxdiff.time_grid(model.scheduler, steps, scheduler, spacing)

        @jax.jit
        def run(params, cond, uncond, times, x):
            denoise = jaxdiff.denoiser(model, params, cond, uncond, 2.0)
            return jaxdiff.sample(denoise, x, times, jaxdiff.get_scheduler(scheduler, model.scheduler), keys)

        x0 = run(params, cond, uncond, jax.tree.map(jnp.asarray, times), scale * noise)
        return np.asarray(x0), np.asarray(decode(params, x0)) * 255

    start_time = time.monotonic()
    reference, images = draw("dpmpp_2m", 1000, "trailing")

    def rms(a: np.ndarray) -> float:
        return float(np.sqrt(np.mean(np.square(a))))

    print(f"Spread of the reference's latents: {reference.std():.3f}.\n")
    print(f"| name | {' | '.join(f'{n} calls' for n in BUDGETS)} |")
    print(f"|---|{'---|' * len(BUDGETS)}")
    for name in jaxdiff.SCHEDULERS:
        cells = []
        for budget in BUDGETS:
            x0, images_drawn = draw(name, steps_of(model.scheduler, name, budget))
            if name in STOCHASTIC:
                cells.append(f"{100 * (x0.std() / reference.std() - 1):+.0f} %")
            else:
                cells.append(f"{rms(x0 - reference):.3f} / {rms(images_drawn - images):.1f}")
        print(f"| `{name}` | {' | '.join(cells)} |", flush=True)
    print(f"\n{time.monotonic() - start_time:.0f} s")


if __name__ == "__main__":
    main()
