"""The sampling loop under jit, vmap and grad; whose noise is whose; leaving out steps."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from jaxdiff.diffusion.base import pad_grid
from jaxdiff.diffusion.prediction import to_denoised
from jaxdiff.diffusion.sampling_loop import sample, sample_keys, step_keys
from jaxdiff.diffusion.schedulers import SCHEDULERS, get_scheduler
from jaxdiff.diffusion.schedules import Time
from jaxdiff.diffusion.spacing import SPACINGS
from jaxdiff.diffusion.times import network_calls, time_grid
from tests.support.scheduler_cases import NAMES as ALL
from tests.support.scheduler_cases import SD1, ZERO_SNR, network

# One of each kind of scheduler in every run, the others in `make test-all`: each is compiled in several forms.
QUICK = ("ddim", "heun", "dpmpp_2m", "dpmpp_sde")
NAMES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ALL]
KEY = jax.random.key(5)
STOCHASTIC = ("ddpm", "euler_ancestral", "dpmpp_2m_sde", "dpmpp_sde", "dpmpp_2s_ancestral", "lcm", "tcd")
# Two programs of the same float32 arithmetic may round otherwise, by 2**-24 = 6e-8 of each number. x and x0 are at most
# some 5, and eps = (x - alpha x0) / sigma magnifies a rounding of x no more than the step shrinks it again; so six
# steps of some five roundings differ by 6 * 5 * 5 * 6e-8.
ROUNDING = 1e-5


def noise(*shape: int):
    """Of [B, 4, 4, 2] where nothing is compiled as a whole: each operation by itself is compiled for each shape."""
    return jax.random.normal(jax.random.key(0), shape)


def denoise(x, time, push=0.0):
    """A stand-in for a guided network, pushed by a parameter."""
    output = network(x, time.t, jnp) + push * jnp.cos(x)
    return to_denoised(output, x, time, "v_prediction")


def run(name: str, x, key=KEY, steps=6, push=0.0, spacing=None, config=SD1, **options):
    times, scale = time_grid(config, steps, name, spacing)
    return sample(functools.partial(denoise, push=push), scale * x, times, get_scheduler(name), key, **options)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_compiled_equals_uncompiled(name):
    """One compiled program a scheduler, against each operation by itself: other tests run one or the other."""
    x = noise(3, 4, 4, 2)
    with jax.disable_jit():
        last, predictions = run(name, x, trajectory=True)
    assert last.shape == x.shape
    assert last.dtype == predictions.dtype == jnp.float32
    compiled = jax.jit(functools.partial(run, name, trajectory=True))(x)
    np.testing.assert_allclose(compiled[0], last, atol=ROUNDING)
    np.testing.assert_allclose(compiled[1], predictions, atol=ROUNDING)


@pytest.mark.parametrize("name", NAMES)
def test_vmap_over_a_parameter_is_the_loop_over_it(name):
    x, pushes = noise(2, 4), jnp.float32([0.0, 0.1, 0.3])
    alone = jax.jit(lambda push: run(name, x, push=push))
    together = jax.vmap(alone)(pushes)
    for push, each in zip(pushes, together, strict=True):
        np.testing.assert_allclose(each, alone(push), atol=ROUNDING)
    assert float(jnp.abs(together[0] - together[2]).max()) > 0.05


@pytest.mark.parametrize(
    ("name", "config"),
    [pytest.param(name, SD1, id=name, marks=() if name in QUICK else pytest.mark.slow) for name in ALL]
    + [
        pytest.param(name, ZERO_SNR, id=f"{name}-zero_snr", marks=marks)
        for name, marks in (("ddim", ()), ("unipc", ()), ("heun", pytest.mark.slow), ("dpmpp_sde", pytest.mark.slow))
    ],
)
def test_gradient_is_the_finite_difference(name, config):
    """With respect to a parameter of the network and to the starting noise."""
    x, direction = noise(2, 4), jax.random.normal(jax.random.key(9), (2, 4))

    @jax.jit
    def loss(push, along):
        return jnp.sum(jnp.sin(run(name, x + along * direction, push=push, config=config)))

    step = 1e-2
    for i, slope in enumerate(jax.jit(jax.grad(loss, (0, 1)))(jnp.float32(0.2), jnp.float32(0.0))):
        ends = [
            loss(*(jnp.float32(v) + jnp.float32(s * step * (i == j)) for j, v in enumerate((0.2, 0.0))))
            for s in (1, -1)
        ]
        # Central differences: step**2 times a third derivative of order 10, and 8 sums of 1e-6 over 2 step.
        assert np.isfinite(slope)
        assert abs(float(slope) - float(ends[0] - ends[1]) / (2 * step)) < 5e-3 * max(1, abs(float(slope)))


@pytest.mark.parametrize(
    ("name", "keys"),
    [(name, "each") for name in (*STOCHASTIC, "dpmpp_2m")]
    # of one key `sample` makes one a sample before a scheduler sees them
    + [pytest.param(name, "one", marks=() if name == "ddpm" else pytest.mark.slow) for name in STOCHASTIC],
)
def test_an_image_does_not_depend_on_its_batch(name, keys):
    x = noise(3, 4, 4, 2)
    key = KEY if keys == "one" else jax.vmap(jax.random.key)(jnp.arange(3))
    with jax.disable_jit():
        whole = run(name, x, key)
        part = run(name, x[:2], key) if keys == "one" else run(name, x[1:], key[1:])
    np.testing.assert_allclose(part, whole[:2] if keys == "one" else whole[1:], atol=ROUNDING)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in (*STOCHASTIC, *QUICK) else pytest.mark.slow) for n in ALL]
)
def test_noise_comes_from_the_key_of_each_sample(name):
    """Same start, two keys: different images where the scheduler draws noise, the same where it does not."""
    x = jnp.tile(noise(1, 4, 4, 2), (3, 1, 1, 1))
    keys = jax.vmap(jax.random.key)(jnp.array([1, 2, 1]))
    with jax.disable_jit():
        a, b, again = run(name, x, keys)
    np.testing.assert_allclose(a, again, atol=ROUNDING)
    if name in STOCHASTIC:
        assert float(jnp.abs(a - b).max()) > 1000 * ROUNDING
    else:
        np.testing.assert_allclose(a, b, atol=ROUNDING)


def test_keys_are_all_different():
    """Over samples, steps and the scalar they come from; old-style keys are keys too."""
    keys = sample_keys(KEY, 50)
    steps = jnp.stack([step_keys(keys, i) for i in range(20)]).reshape(-1)
    data = np.asarray(jax.random.key_data(jnp.concatenate([KEY[None], keys, steps])))
    assert len(np.unique(data, axis=0)) == len(data)
    old = jax.random.PRNGKey(5)
    np.testing.assert_array_equal(jax.random.key_data(sample_keys(old, 50)), jax.random.key_data(keys))


def test_keys_of_another_number_of_samples_are_refused():
    """One key among three would give all samples the same noise."""
    for keys in (sample_keys(KEY, 1), sample_keys(KEY, 2)):
        with pytest.raises(ValueError, match=r"key has shape .* for 3 samples"):
            run("ddpm", noise(3, 2), keys, steps=2)


@pytest.mark.parametrize("name", NAMES)
def test_start_runs_the_tail(name):
    """Leaving out steps is running the rest of the grid, for a start that is traced."""
    x, steps = noise(2, 4), 9
    times = jax.tree.map(jnp.asarray, time_grid(SD1, steps, name)[0])
    scheduler = get_scheduler(name)
    keys = sample_keys(KEY, 2)

    @jax.jit
    def tail(start):
        return sample(denoise, x, times, scheduler, KEY, start=start)

    step = jax.jit(lambda state, i: scheduler.step(denoise, state, times, i, step_keys(keys, i)))
    for start in (0, 4, 8):
        state = scheduler.init(x)
        for i in range(start, steps):
            state = step(state, i)
        np.testing.assert_allclose(tail(start), state.x, atol=ROUNDING)
    assert tail._cache_size() == 1
    np.testing.assert_allclose(tail(0), sample(denoise, x, times, scheduler, KEY), atol=ROUNDING)
    np.testing.assert_array_equal(tail(steps), x)  # no step is taken


@pytest.mark.parametrize("name", NAMES)
def test_one_program_for_every_grid(name):
    """Spacing, keys and the network's parameters are traced; a number of steps has one program, and all draw."""
    scheduler, x, traced = get_scheduler(name), noise(2, 4), []

    @jax.jit
    def program(times, scale, key, push):
        traced.append(None)
        return sample(functools.partial(denoise, push=push), scale * x, times, scheduler, key)

    for count, steps in enumerate((1, 2, 20), 1):
        results = [program(*time_grid(SD1, steps, name, s), jax.random.key(i), 0.1 * i) for i, s in enumerate(SPACINGS)]
        assert np.isfinite(results).all()
        assert len(traced) == count
    assert len({float(r.sum()) for r in results}) == len(SPACINGS)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_a_grid_that_is_filled_up_gives_the_same(name):
    """From the start, from a later step, and up to one."""
    x, scheduler = noise(2, 4, 4, 2), get_scheduler(name)
    with jax.disable_jit():
        for steps, options in ((1, {}), (4, {"start": 1}), (4, {"stop": 3})):
            times, scale = time_grid(SD1, steps, name)
            whole, filled = (
                sample(denoise, scale * x, grid, scheduler, KEY, trajectory=True, **options)
                for grid in (times, pad_grid(times, 6))
            )
            np.testing.assert_array_equal(filled[0], whole[0])
            np.testing.assert_array_equal(filled[1][: options.get("stop", steps)], whole[1][: options.get("stop")])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_one_program_for_all_numbers_of_steps(name):
    """None of which is taken in vain: the network is called as often as for the grid itself."""
    x, scheduler, calls = noise(2, 4), get_scheduler(name), []

    def counted(x, time):
        jax.debug.callback(lambda: calls.append(None))
        return denoise(x, time)

    program = jax.jit(lambda times, scale: sample(counted, scale * x, times, scheduler, KEY))
    for steps in (1, 2, 15, 20):
        times, scale = time_grid(SD1, steps, name)
        calls.clear()
        drawn = program(pad_grid(times, 20), scale)
        jax.effects_barrier()
        assert len(calls) == network_calls(SD1, steps, name)
        np.testing.assert_allclose(drawn, run(name, x, steps=steps), atol=ROUNDING)
    assert program._cache_size() == 1


@pytest.mark.parametrize("name", NAMES)
def test_trajectory_holds_the_prediction_of_each_step(name):
    x, seen = noise(2, 4, 4, 2), []

    def spy(x, time):
        x0 = denoise(x, time)
        seen.append((float(time.t), np.asarray(x0)))
        return x0

    times, scheduler = time_grid(SD1, 5, name)[0], get_scheduler(name)
    with jax.disable_jit():
        last, predictions = sample(spy, x, times, scheduler, KEY, trajectory=True)
        assert predictions.shape == (5, *x.shape)
        assert len(seen) == network_calls(SD1, 5, name)
        _, tail = sample(denoise, x, times, scheduler, KEY, start=3, trajectory=True)
    np.testing.assert_array_equal(tail[:3], jnp.stack([x] * 3))  # no arithmetic has touched these
    # The calls within a step: the second of each, or of the first alone.
    between = {"pndm": [1]}.get(name, range(1, 9, 2) if network_calls(SD1, 5, name) == 9 else [])
    first_calls = [call for i, call in enumerate(seen) if i not in between]
    np.testing.assert_allclose(predictions, [x0 for _, x0 in first_calls], atol=ROUNDING)
    np.testing.assert_array_equal([t for t, _ in first_calls], times.t[:-1])
    if times.sigma[-1] == 0 and name != "lms":  # whose last step is of order 4 too
        np.testing.assert_allclose(last, predictions[-1], atol=ROUNDING)


@pytest.mark.parametrize("name", [*NAMES, "prk"])
def test_calls_of_the_network(name):
    """`network_calls`: 2 N - 1 for Heun's and its like, N + 1 or N + 9 for PNDM, one a step for the others."""
    config = dataclasses.replace(SD1, skip_prk_steps=name != "prk")
    name, made = "pndm" if name == "prk" else name, []

    def counting(x, time):
        jax.debug.callback(lambda: made.append(None))
        return denoise(x, time)

    times = time_grid(config, 6, name)[0]
    sample(counting, noise(1, 2), times, get_scheduler(name, config), KEY).block_until_ready()
    jax.effects_barrier()
    assert len(made) == network_calls(config, 6, name)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_the_networks_alone(name, dtype):
    """Rounding its output is all that changes: values so rounded draw the same image when they come in float32."""
    (times, scale), kept = time_grid(SD1, 4, name), jnp.finfo(dtype)

    def rounded(x):
        return jax.lax.reduce_precision(x, kept.nexp, kept.nmant)

    def drawn(as_type):
        def network(x, time):
            assert x.dtype == jnp.float32
            return rounded(denoise(x, time)).astype(as_type)

        return sample(network, rounded(scale * noise(2, 4, 4, 2)).astype(as_type), times, get_scheduler(name), KEY)

    with jax.disable_jit():
        low, full = drawn(dtype), drawn(jnp.float32)
    assert low.dtype == jnp.float32
    np.testing.assert_allclose(low, full, atol=ROUNDING)


@pytest.mark.parametrize(
    "name",
    ["ddpm", "unipc", *(pytest.param(n, marks=pytest.mark.slow) for n in ("heun", "dpmpp_2m", "pndm", "dpmpp_sde"))],
)
def test_sampling_maps_over_devices(name):
    """The program may be mapped over a mesh axis: keys and noise of each device's own samples."""
    times, keys, x = time_grid(SD1, 4, name)[0], jax.vmap(jax.random.key)(jnp.arange(2)), noise(2, 4)
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(PartitionSpec("data"),) * 2 + (PartitionSpec(),),
        out_specs=PartitionSpec("data"),
    )
    def mapped(x, keys, start):
        return sample(denoise, x, times, get_scheduler(name), keys, start=start)

    one = jax.jit(lambda start: sample(denoise, x, times, get_scheduler(name), keys, start=start))
    for start in (0, 2):
        np.testing.assert_allclose(jax.jit(mapped)(x, keys, start), one(start), atol=ROUNDING)


def test_grids_made_by_hand():
    """Three arrays are a grid; ddim's steps then end at the next entry, and agree with euler's."""
    angle = jnp.linspace(1.5, 0.0, 11)
    times = Time(600 * angle, jnp.cos(angle), jnp.sin(angle))
    x = noise(2, 4, 4, 2)
    with jax.disable_jit():
        ends = [sample(denoise, x, times, SCHEDULERS[name](), KEY) for name in ("ddim", "euler")]
    np.testing.assert_allclose(*ends, atol=ROUNDING)
