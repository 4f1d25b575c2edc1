"""Every scheduler follows diffusers' class of it: live where diffusers is installed, by golden paths everywhere."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.config import SchedulerConfig
from jaxdiff.diffusion import prediction
from jaxdiff.diffusion.base import clip_to, time_at
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
# The lowest level of "cosine" has 1 - alpha^2 = 4e-5, of which the oracle's float32 keeps three digits.
TOLERANCES = {"karras_cosine": 5e-4}
RELATIVE = 1e-5  # for the few paths of Heun's that go astray at 7 steps, to x of some 80
# The sigma of the oracle comes from 1 - alpha^2 in float32, of which at most 1e-4 are left at t = 0: 2**-24 / 1e-4.
SIGMA_TOLERANCE = 1e-3


def path_of(case: Case) -> np.ndarray:
    """x after each step that `sample` takes, [N, B, D].

    Nothing is compiled: each operation runs by itself, which takes a fraction of compiling a scan that runs once.
    tests/test_sampling.py compares compiled programs with uncompiled ones.
    """
    config = case.values
    times, scale = time_grid(config, case.steps, case.scheduler)
    times, scheduler = jax.tree.map(jnp.asarray, times), get_scheduler(case.scheduler, config)
    if case.eta:
        scheduler = ddim(case.eta, clip_to(config.clip_sample_range) if config.clip_sample is None else None)
    x, key = scale * jnp.asarray(start()), jax.random.key(KEY)
    if case.start:
        x = prediction.add_noise(original(), start(), time_at(times, scheduler.start_index(case.start)))
    if case.masked:
        scheduler = masked_blending(scheduler, original(), start(), MASK)

    def denoise(x, time):
        output = (mixing if case.masked else network)(x, time.t, jnp)
        return prediction.to_denoised(output, x, time, config.prediction_type)

    path: list[jax.Array] = []

    def step(*args):
        state = scheduler.step(*args)
        path.append(state.x)
        return state

    with jax.disable_jit():
        sample(denoise, x, times, scheduler._replace(step=step), key, start=case.start)
    return np.stack(path)


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


def test_golden_paths_are_those_of_diffusers(golden):
    pytest.importorskip("diffusers")
    from tests.support import scheduler_oracle

    for case in cases():
        run = scheduler_oracle.run(case)
        np.testing.assert_allclose(run, golden[str(case)], rtol=RELATIVE, atol=TOLERANCE, err_msg=str(case))


GRIDS = [(c, n) for c in CONFIGS for n in NAMES if comparable(c, n)]


def counts(values: SchedulerConfig, name: str) -> list[int]:
    """Numbers of steps that the class can lay out; the oracle's search for the times of levels is slow."""
    levels = values.use_karras_sigmas or values.use_exponential_sigmas or values.use_beta_sigmas
    found = [*range(2, 17), 20, 25, 33, *([] if levels or name == "dpmpp_sde" else [50, 100, 250, 333])]
    least = 4 if name == "pndm" and not values.skip_prk_steps else 1
    most = values.original_inference_steps if name in ("lcm", "tcd") else values.num_train_timesteps - 1
    return [n for n in found if least <= n <= most]


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
