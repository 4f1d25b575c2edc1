"""Every scheduler follows diffusers' class of it: live where diffusers is installed, by golden paths everywhere."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.config import SchedulerConfig
from jaxdiff.diffusion import prediction
from jaxdiff.diffusion.base import Scheduler, clip_to, pad_grid, time_at
from jaxdiff.diffusion.inpainting import masked_blending
from jaxdiff.diffusion.sampling_loop import sample
from jaxdiff.diffusion.schedulers import get_scheduler
from jaxdiff.diffusion.schedules import Time, at, noise_schedule
from jaxdiff.diffusion.singlestep import ddim
from jaxdiff.diffusion.times import RULES, default_scheduler, skip_prk_steps, time_grid
from tests.make_golden_schedulers import GOLDEN
from tests.support.scheduler_cases import (
    CLASSES,
    CONFIGS,
    KEY,
    MASK,
    NAMES,
    SOLVERS,
    Case,
    cases,
    comparable,
    mixing,
    network,
    original,
    spacings,
    start,
)

# torch tensors in numpy's functions, inside diffusers.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.algorithm_types dpmsolver:FutureWarning"),
]

# x is of order 1, the x0 in it up to 1/alpha = 15 times less certain; float32 tables of 1000 factors err by some 1e-6.
TOLERANCE = 1e-4
MOST_STEPS = 20
# The lowest level of "cosine" has 1 - alpha^2 = 4e-5, of which the oracle's float32 keeps three digits.
TOLERANCES = {"karras_cosine": 5e-4}
RELATIVE = 1e-5  # for the few paths of Heun's that go astray at 7 steps, to x of some 80
# The sigma of the oracle comes from 1 - alpha^2 in float32, of which at most 1e-4 are left at t = 0: 2**-24 / 1e-4.
SIGMA_TOLERANCE = 1e-3


# What only the time grid reads: schedulers of configs that differ in nothing else are one compiled program.
GRID = ("beta_start", "beta_end", "trained_betas", "num_train_timesteps", "rescale_betas_zero_snr", "shift",
        "steps_offset", "timestep_spacing", "set_alpha_to_one", "interpolation_type", "use_karras_sigmas",
        "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "sigma_min", "sigma_max",
        "original_inference_steps")  # fmt: skip


class Followed(NamedTuple):
    """A scheduler's state, with x in the place of the prediction of x0, which `sample` returns of each step."""

    inner: Any
    x: jax.Array
    denoised: jax.Array


def followed(scheduler: Scheduler) -> Scheduler:
    def following(inner):
        return Followed(inner, inner.x, inner.x)

    def step(denoise, state, *args):
        return following(scheduler.step(denoise, state.inner, *args))

    return scheduler._replace(init=lambda x: following(scheduler.init(x)), step=step)


@functools.cache
def compiled(name: str, config: SchedulerConfig, eta: float, masked: bool) -> Callable[..., jax.Array]:
    """(x, times, steps left out, index of a prediction type) -> x after each step that `sample` takes, [N, B, ...]."""
    scheduler = get_scheduler(name, config)
    if eta:
        scheduler = ddim(eta, clip_to(config.clip_sample_range) if config.clip_sample is None else None)
    if masked:
        scheduler = masked_blending(scheduler, original(), start(), MASK)

    @jax.jit
    def path(x, times, left_out, prediction_type):
        def denoise(x, time):
            output = (mixing if masked else network)(x, time.t, jnp)
            of_types = [prediction.to_denoised(output, x, time, kind) for kind in prediction.PREDICTION_TYPES]
            return jnp.stack(of_types)[prediction_type]

        key = jax.random.key(KEY)
        return sample(denoise, x, times, followed(scheduler), key, start=left_out, trajectory=True)[1]

    return path


def path_of(case: Case) -> np.ndarray:
    """x after each step, [N, B, D]."""
    config, blank = case.values, SchedulerConfig()
    times, scale = time_grid(config, case.steps, case.scheduler)
    x = scale * start()
    if case.start:
        first = get_scheduler(case.scheduler, config).start_index(case.start)
        x = np.asarray(prediction.add_noise(original(), start(), time_at(times, first)))
    # pndm alone asks for the prediction type
    unread = GRID if case.scheduler == "pndm" else (*GRID, "prediction_type")
    config = dataclasses.replace(config, **{key: getattr(blank, key) for key in unread})
    path = compiled(case.scheduler, config, case.eta, case.masked)
    kind = prediction.PREDICTION_TYPES.index(case.values.prediction_type)
    # One program for all numbers of steps; but those of pndm depend on it, and one config goes without.
    if case.scheduler != "pndm" and case.config != "defaults":
        times = pad_grid(times, MOST_STEPS)
    return np.asarray(path(x, times, case.start, kind))[case.start : case.steps]


def together() -> dict[tuple[str, str], list[Case]]:
    """The cases by config and scheduler."""
    found: dict[tuple[str, str], list[Case]] = {}
    for case in cases():
        found.setdefault((case.config, case.scheduler), []).append(case)
    return found


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as file:
        return dict(file)


@pytest.mark.parametrize(("config", "name"), together(), ids=lambda v: v)
def test_paths_equal_the_golden_ones(config, name, golden):
    """Every spacing, number of steps and start of a config and scheduler, step by step."""
    for case in together()[config, name]:
        tolerance = TOLERANCES.get(config, TOLERANCE)
        np.testing.assert_allclose(
            path_of(case), golden[str(case)], rtol=RELATIVE, atol=tolerance, err_msg=f"{case}: {case.steps} steps"
        )


def test_every_golden_path_is_compared(golden):
    assert set(golden) == {str(case) for found in together().values() for case in found}
    assert {name for _, name in together()} == set(CLASSES)


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_golden_paths_are_those_of_diffusers(every, golden):
    """A fifth of them in every run: what changes here is the installed diffusers, not our code."""
    pytest.importorskip("diffusers")
    from tests.support import scheduler_oracle

    for case in cases()[::every]:
        run = scheduler_oracle.run(case)
        np.testing.assert_allclose(run, golden[str(case)], rtol=RELATIVE, atol=TOLERANCE, err_msg=str(case))


GRIDS = [(c, n) for c in CONFIGS for n in NAMES if comparable(c, n)]


def counts(values: SchedulerConfig, name: str) -> list[int]:
    """Numbers of steps that the class can lay out; the oracle's search for the times of levels is slow."""
    levels = values.use_karras_sigmas or values.use_exponential_sigmas or values.use_beta_sigmas
    few = levels or name == "dpmpp_sde"
    found = [2, 3, 4, 7, 10, 15, 25] if few else [*range(2, 17), 20, 25, 33, 50, 100, 250, 333]
    least = 4 if name == "pndm" and not values.skip_prk_steps else 1
    most = values.original_inference_steps if name in ("lcm", "tcd") else values.num_train_timesteps - 1
    return [n for n in found if least <= n <= most]


@pytest.mark.slow
@pytest.mark.parametrize(("config", "name"), GRIDS, ids=lambda v: v)
def test_grid_equals_that_of_diffusers(config, name):
    """Times, levels and the scale of the first noise, for many numbers of steps: ties must round alike."""
    pytest.importorskip("diffusers")
    from tests.support import scheduler_oracle

    flow = config.startswith("flow")
    points = unequal = 0
    for spacing in spacings(config, name):
        values = Case(config, name, spacing, 1).values
        for steps in counts(values, name):
            t, sigma, scale = scheduler_oracle.grid(values, name, steps)
            times, our_scale = time_grid(values, steps, name)
            # The solvers make the times of levels and flows whole: near a tie, the errors of the float32 table decide.
            levels = values.use_karras_sigmas or values.use_exponential_sigmas or values.use_beta_sigmas
            rounded = (levels or values.use_lu_lambdas or flow) and name in SOLVERS
            # The fractional times of karras inherit the oracle's error in the lowest sigma, where log sigma rises by
            # 0.003 a time or more. All others are the same numbers in float32.
            bound = 1 if rounded else SIGMA_TOLERANCE / 0.003 if levels else 1e-3
            # diffusers' trailing grid has a point too many for some N, at t = -1.
            np.testing.assert_allclose(times.t[:-1], t[:steps], rtol=0, atol=bound)
            points, unequal = points + steps, unequal + np.sum(np.abs(times.t[:-1] - t[:steps]) > 0.5)
            alpha = np.ones(steps + 1) if flow else times.alpha
            if sigma is not None and len(t) == steps:
                np.testing.assert_allclose(times.sigma, sigma * alpha, rtol=SIGMA_TOLERANCE, atol=1e-6)
            if RULES[name].scale_initial_noise:
                np.testing.assert_allclose(our_scale, scale * alpha[0], rtol=1e-5)
            else:
                assert our_scale == scale == 1
    assert unequal < 0.1 * points  # half would be, were they rounded otherwise


SCHEDULES = ["sd1", "defaults", "cosine", "zero_snr", "trained"]


@pytest.mark.parametrize("config", SCHEDULES)
def test_schedule_equals_that_of_diffusers(config):
    pytest.importorskip("diffusers")
    from tests.support import scheduler_oracle

    values = CONFIGS[config]
    reference = scheduler_oracle.build(values, "ddim").alphas_cumprod.numpy().astype(np.float64)
    schedule = noise_schedule(values)
    assert schedule.alpha.dtype == schedule.sigma.dtype == np.float32
    # A product of up to 1000 float32 factors errs by 1000 * 2**-24 = 6e-5 at the very most.
    np.testing.assert_allclose(schedule.alpha, np.sqrt(reference), rtol=6e-5, atol=1e-7)
    np.testing.assert_allclose(schedule.sigma, np.sqrt(1 - reference), rtol=SIGMA_TOLERANCE)
    # Entries of the table are interpolated with weights 0 and 1: exactly themselves.
    np.testing.assert_array_equal(at(schedule, np.arange(len(reference))).alpha, schedule.alpha)


def test_own_class_names_the_scheduler():
    for name, cls in CLASSES.items():
        algorithm = "sde-dpmsolver++" if name == "dpmpp_2m_sde" else "dpmsolver++"
        assert default_scheduler(SchedulerConfig(class_name=cls, algorithm_type=algorithm)) == name
    assert default_scheduler(SchedulerConfig(class_name="KDPM2DiscreteScheduler")) == "dpmpp_2m"


# What scheduler_config.json may say that is no field of ours.
ELSEWHERE = {
    *("self", "noise_sampler_seed", "solver_p"),  # PyTorch objects and seeds
    *("use_flow_sigmas", "flow_shift"),  # read as beta_schedule and shift
    *("time_shift_type", "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len"),  # dynamic shifting
}


def test_no_key_of_flows_is_passed_over():
    pytest.importorskip("diffusers")
    import inspect

    import diffusers

    known = {*dataclasses.asdict(SchedulerConfig()), *ELSEWHERE}
    for cls in (diffusers.FlowMatchEulerDiscreteScheduler, diffusers.FlowMatchHeunDiscreteScheduler):
        assert set(inspect.signature(cls.__init__).parameters) <= known


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES)
def test_defaults_of_each_class(name):
    """Every key is known; spacing, clipping, betas and the end of the last step where the config says nothing."""
    pytest.importorskip("diffusers")
    import inspect

    from tests.support import scheduler_oracle

    cls = scheduler_oracle.diffusers_class(CLASSES[name])
    defaults = {k: p.default for k, p in inspect.signature(cls.__init__).parameters.items()}
    silent = SchedulerConfig.from_dict({"_class_name": CLASSES[name]})
    rule, own = RULES[name], ("skip_prk_steps", "set_alpha_to_one", "timestep_spacing", "clip_sample", "solver_type")
    assert rule.spacing in (defaults["timestep_spacing"], "distilled")
    assert rule.sigma_spacings == ("use_karras_sigmas" in defaults)
    if name == "pndm":
        assert skip_prk_steps(silent) == defaults["skip_prk_steps"]
    assert set(defaults) <= {*dataclasses.asdict(silent), *ELSEWHERE}
    for key in set(dataclasses.asdict(silent)) & set(defaults) - set(own):
        assert (getattr(silent, key) or None) == (defaults[key] or None) or key == "variance_type", key
    far = Time(jnp.float32([999.0, 0.0]), jnp.float32([0.1, 1.0]), jnp.float32([0.99, 0.0]))
    far = far._replace(substeps=Time(*(a[:1, None] for a in far[:3])))
    end = time_grid(silent, 10, name)[0]
    if rule.final_sigma == "set_alpha_to_one":
        assert (end.sigma[-1] == 0) == defaults["set_alpha_to_one"]
    with jax.disable_jit():
        x0 = sample(lambda x, time: 3 + 0 * x, jnp.zeros((1, 2)), far, get_scheduler(name, silent), jax.random.key(0))
    np.testing.assert_allclose(x0, 1 if defaults.get("clip_sample") else 3, rtol=1e-5)
