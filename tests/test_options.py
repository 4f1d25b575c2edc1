"""Every option of training does what it says: each test fails where the option is ignored."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdiff import parallel
from jaxdiff.config import ConfigError, SchedulerConfig
from jaxdiff.models.layers import REMAT_POLICIES, Transformer2D, rematerialised
from jaxdiff.training import ema
from jaxdiff.training.loop import Stage, fit
from jaxdiff.training.optimizer import optimizer
from jaxdiff.training.options import NoiseOptions, Options, OptionsError
from jaxdiff.training.stages import diffusion_stage, random_noise, random_times
from jaxdiff.training.train_step import init_state, make_train_step
from tests.support.stages import BATCH, keys, options, pairs
from tests.support.tiny import SCHEDULER, tiny_model

# --- noise and times


def test_offset_noise_moves_whole_channels():
    plain, moved = (np.asarray(random_noise(keys(256), (8, 8, 4), offset)) for offset in (0.0, 0.5))
    # Means of 64 unit Gaussians have a variance of 1/64; the offset adds its own, 0.25. 1,024 draws know a variance to
    # sqrt(2/1024) = 4.4%.
    np.testing.assert_allclose(plain.mean((1, 2)).var(), 1 / 64, rtol=0.2)
    np.testing.assert_allclose(moved.mean((1, 2)).var(), 1 / 64 + 0.25, rtol=0.2)
    np.testing.assert_allclose((moved - plain).std((1, 2)), 0, atol=1e-5)  # the same for every place, but for rounding


def test_input_perturbation_is_in_the_input_and_not_in_the_target():
    """A network that knows the noise of its input exactly errs by the perturbation alone."""
    model = tiny_model(SchedulerConfig(beta_schedule="flow", prediction_type="epsilon"))
    latents = np.zeros((BATCH, 8, 8, 4), np.float32)

    def loss(amount: float) -> float:
        # Latents are zero, so that what the network sees is sigma (eps + amount more).
        stage = diffusion_stage(
            model, network=lambda params, x, time, *_: x / time.sigma[:, None, None, None],
            input_perturbation=amount, caption_dropout=0.0,
        )  # fmt: skip
        params = {"text_encoder": encoder}
        return float(stage.loss(params, {"latents": latents, "tokens": pairs(BATCH)["tokens"]}, keys())[0])

    from tests.support.tiny import tiny_params

    encoder = tiny_params(model)["text_encoder"]
    assert loss(0.0) < 1e-8
    np.testing.assert_allclose(loss(0.3), 0.09, rtol=0.2)  # 1,024 draws: a variance to 4.4%


def test_logit_normal_times():
    many = keys(4096)
    t = np.asarray(random_times(SCHEDULER, many, NoiseOptions(times="logit_normal", logit_mean=1.0, logit_std=0.5)))
    assert t.min() >= 0
    assert t.max() <= 999
    u = (t + 0.5) / 1000
    logits = np.log(u / (1 - u))
    # Deviations of a mean and of a deviation of 4,096 draws are 0.5/64 and 0.5/90; five of them.
    np.testing.assert_allclose(logits.mean(), 1.0, atol=0.04)
    np.testing.assert_allclose(logits.std(), 0.5, atol=0.03)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"times": "cosine"}, "times 'cosine'"),
        ({"offset_noise": -1.0}, "offset_noise"),
        ({"logit_std": 0.0}, "logit_std"),
    ],
)
def test_noising_that_cannot_be_is_named(changes, named):
    with pytest.raises(OptionsError, match=named):
        NoiseOptions(**changes)


# --- averages after training


def test_power_averages_of_a_straight_line():
    """The average of theta(tau) = tau is t (gamma + 1) / (gamma + 2), by equation (1)."""
    sigmas, steps = (0.05, 0.1, 0.2), 2000
    tx = ema.track(sigmas)
    params = {"w": jnp.zeros(())}

    def body(carry, _):
        params, state = carry
        updates, state = tx.update({"w": jnp.ones(())}, state, params)
        return (optax.apply_updates(params, updates), state), None

    (_, state), _ = jax.lax.scan(body, (params, tx.init(params)), length=steps)
    for sigma, average in zip(sigmas, state.averages, strict=True):
        g = ema.gamma(sigma)
        np.testing.assert_allclose((g + 1) / (g + 2) ** 2 / (g + 3), sigma**2, rtol=1e-9)
        # Sums instead of integrals: relative errors of 1 / steps.
        np.testing.assert_allclose(average["w"], steps * (g + 1) / (g + 2), rtol=2e-3)
    for wrong in (0.0, 0.3):
        with pytest.raises(ConfigError, match="length"):
            ema.gamma(wrong)


def test_an_average_of_another_length_comes_out_of_snapshots(tmp_path):
    sigmas, wanted, steps = (0.05, 0.10), (0.05, 0.07, 0.15, 0.2), 400
    tx, asked = ema.track(sigmas), ema.track(wanted)
    walk = np.cumsum(np.random.default_rng(0).normal(size=(steps + 1, 64)), 0).astype(np.float32)
    params = {"unet": {"w": jnp.asarray(walk[0])}}
    state, direct = tx.init(params), asked.init(params)
    both = jax.jit(lambda u, p, a, b: (tx.update(u, a, p)[1], asked.update(u, b, p)[1]))
    snapshots = ema.Snapshots(tmp_path, sigmas)
    for step in range(1, steps + 1):
        updates = {"unet": {"w": jnp.asarray(walk[step] - walk[step - 1])}}
        state, direct = both(updates, params, state, direct)
        params = {"unet": {"w": jnp.asarray(walk[step])}}
        if step % 50 == 0:
            snapshots.save((optax.EmptyState(), state))
    with snapshots:  # leaving waits for what is being written
        pass
    spread = np.std(walk[-1] - np.asarray(state.averages[1]["unet"]["w"]))
    for sigma, average in zip(wanted, direct.averages, strict=True):
        found = ema.reconstruct(tmp_path, sigma, params)["unet"]["w"]
        error = np.abs(found - average["unet"]["w"]).max() / spread
        assert error < 0.12, (sigma, error)
        if sigma not in sigmas:  # nearer than what was tracked, by far
            for tracked in state.averages:
                assert error < 0.3 * np.abs(tracked["unet"]["w"] - average["unet"]["w"]).max() / spread
    # The end of the training may be chosen too.
    earlier = ema.reconstruct(tmp_path, 0.05, params, updates=200)["unet"]["w"]
    again = ema.open_tensors(tmp_path / "200.safetensors").read("0.05:unet/w")
    np.testing.assert_allclose(earlier, again, atol=1e-3 * spread)
    with pytest.raises(ConfigError, match="no snapshots"):
        ema.reconstruct(tmp_path / "none", 0.1, params)
    with pytest.raises(ConfigError, match="another model: it has no unet/w"):
        ema.reconstruct(tmp_path, 0.1, {"unet": {"v": walk[0]}})


def test_training_leaves_snapshots(tmp_path):
    stage = Stage(
        "line", ("unet",), lambda params, batch, keys: (jnp.mean((params["unet"]["w"] - batch["x"]) ** 2), {})
    )

    class Ones:
        def __iter__(self):
            return self

        def __next__(self):
            return {"x": np.ones((BATCH, 3), np.float32)}

        def get_state(self):
            return 0

        def set_state(self, state):
            pass

    o = options(steps=6, ema_sigmas=(0.05, 0.1), snapshot_every=2, ema_decay=0.0, learning_rate=0.1)
    result = fit(
        stage,
        {"unet": {"w": np.zeros(3, np.float32)}},
        Ones(),
        o,
        tmp_path,
        mesh=parallel.mesh(devices=jax.devices()[:1]),
    )
    assert sorted(p.stem for p in (tmp_path / "ema").iterdir()) == ["2", "4", "6"]
    average = ema.reconstruct(tmp_path / "ema", 0.1, result.params)["unet"]["w"]
    assert ((average > 0) & (average < result.params["unet"]["w"])).all()


# --- rematerialisation


def test_policies_keep_what_they_say():
    """Forward products that are computed again in the backward pass, counted in the program."""
    x, context = jnp.ones((1, 4, 4, 8)), jnp.ones((1, 3, 8))

    def products(remat) -> int:
        layer = rematerialised(Transformer2D, remat)(heads=2, groups=2)
        params = jax.eval_shape(layer.init, jax.random.key(0), x, context)
        program = jax.make_jaxpr(jax.grad(lambda p: layer.apply(p, x, context).sum()))(params)
        return str(program).count("dot_general[")

    counts = {name: products(name) for name in ("", *REMAT_POLICIES)}
    assert counts["full"] > counts["dots_no_batch"] > counts["dots"] == counts[""]
    assert products(True) == counts["full"]
    assert products(False) == counts[""]
    with pytest.raises(ConfigError, match="remat 'all'"):
        products("all")


# --- what was there before, in one place


def test_a_step_obeys_each_of_these_options():
    """One step of a line: what is asked of the learning rate, the clipping and the average shows in the state."""

    def step(**changes):
        o = options(**{"learning_rate": 0.1, "clip_norm": 0.0, "ema_decay": 0.0, **changes})
        mesh, params = parallel.mesh(devices=jax.devices()[:1]), {"w": np.full(3, 2.0, np.float32)}
        state = init_state(params, optimizer(o), mesh)
        run = make_train_step(lambda p, b, k: (jnp.mean(p["w"] ** 2), {}), o, mesh, state)
        state, metrics = run(state, {}, {"x": np.zeros(BATCH)})
        return state, metrics

    state, metrics = step()
    np.testing.assert_allclose(state.params["w"], 1.9, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], np.sqrt(3) * 4 / 3, rtol=1e-5)
    np.testing.assert_allclose(step(warmup_steps=2)[0].params["w"], 2.0)  # the first of a warm-up is 0
    np.testing.assert_allclose(step(ema_decay=0.9)[0].ema["w"], 0.1 * 2 + 0.9 * 1.9, rtol=1e-5)
    b1_moment = jax.tree.leaves(step(clip_norm=0.1)[0].opt_state)
    assert any(x.shape == (3,) and np.allclose(x, 0.1 * 0.1 / np.sqrt(3), rtol=1e-4) for x in b1_moment)
    assert isinstance(Options(1, 1), Options)
