"""Every option of training does what it says: each test fails where the option is ignored."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdiff import parallel
from jaxdiff.config import ConfigError
from jaxdiff.models.layers import REMAT_POLICIES, Transformer2D, rematerialised
from jaxdiff.scheduler_config import SchedulerConfig
from jaxdiff.training import ema
from jaxdiff.training.loop import Stage, fit
from jaxdiff.training.optimizer import SMALL, AdamInt8, check_rates, clip_by_global_norm, group_rates, optimizer
from jaxdiff.training.stages import Noising, diffusion_stage, random_noise, random_times
from jaxdiff.training.state import Options, OptionsError, init_state, make_train_step
from tests.test_training import BATCH, keys, options, pairs
from tests.tiny import SCHEDULER, tiny_model

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

    from tests.tiny import tiny_params

    encoder = tiny_params(model)["text_encoder"]
    assert loss(0.0) < 1e-8
    np.testing.assert_allclose(loss(0.3), 0.09, rtol=0.2)  # 1,024 draws: a variance to 4.4%


def test_logit_normal_times():
    many = keys(4096)
    t = np.asarray(random_times(SCHEDULER, many, Noising(times="logit_normal", logit_mean=1.0, logit_std=0.5)))
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
        Noising(**changes)


# --- optimizers

WIDE = 128


def weights() -> dict:
    rng = np.random.default_rng(0)
    shapes = {"unet": {"kernel": (WIDE, WIDE), "bias": (WIDE,)}, "text_encoder": {"kernel": (3, 3, 32, 32)}}
    return jax.tree.map(
        lambda s: jnp.asarray(rng.normal(size=s), jnp.float32), shapes, is_leaf=lambda s: isinstance(s, tuple)
    )


def run(steps: int = 1, **changes):
    """(parameters before, after, state of the optimizer) on a quadratic whose curvature differs by row."""
    o = options(**{"learning_rate": 1e-2, "clip_norm": 0.0, "schedule": "constant", **changes})
    params, tx = weights(), optimizer(o)
    state = tx.init(params)

    @jax.jit
    def step(p, state):
        grads = jax.tree.map(lambda x: x * jnp.linspace(0.01, 1.0, x.shape[0]).reshape(-1, *[1] * (x.ndim - 1)), p)
        updates, state = tx.update(grads, state, p)
        return optax.apply_updates(p, updates), state

    new = params
    for _ in range(steps):
        new, state = step(new, state)
    return params, new, state


def change(name: str = "kernel", **changes) -> np.ndarray:
    old, new, _ = run(**changes)
    return np.asarray(new["unet"][name] - old["unet"][name])


def test_each_optimizer_makes_its_own_update():
    rate = 1e-2
    np.testing.assert_allclose(np.abs(change()), rate, rtol=1e-3)  # Adam's first: the sign, but for eps
    lion = change(optimizer="lion")
    np.testing.assert_allclose(np.abs(lion), rate, rtol=1e-4)  # the sign; taken from the sum, which is rounded
    assert not np.allclose(change(steps=5), change(optimizer="lion", steps=5))
    # Muon's is orthogonal up to its polynomial's tolerance, singular values in 0.7 … 1.2, and of 0.2 of Adam's size.
    muon = change(optimizer="muon")
    values = np.linalg.svd(muon, compute_uv=False)
    assert values.max() / np.median(values) < 2
    np.testing.assert_allclose(np.sqrt((muon**2).mean()), 0.2 * rate, rtol=0.3)
    # Vectors go by Adam with Nesterov's momentum, whose first step is 0.9 * 0.1 / 0.19 longer.
    np.testing.assert_allclose(np.abs(change("bias", optimizer="muon")), (1 + 0.09 / 0.19) * rate, rtol=1e-3)
    # Adafactor's has a root mean square of at most 1, and second moments of rows and columns alone.
    _, _, state = run(optimizer="adafactor")
    np.testing.assert_allclose(np.sqrt((change(optimizer="adafactor") ** 2).mean()), rate, rtol=0.05)
    assert sum(x.size for x in jax.tree.leaves(state)) < WIDE * WIDE
    sizes = {"adamw": 2, "lion": 1}
    for name, moments in sizes.items():
        held = sum(x.size for x in jax.tree.leaves(run(optimizer=name)[2]))
        assert held == pytest.approx(moments * sum(x.size for x in jax.tree.leaves(weights())), abs=8)


@pytest.mark.parametrize("name", ["adamw", "lion", "muon"])
def test_the_first_moment_in_bfloat16(name):
    state = run(optimizer=name, moments="bfloat16")[2]
    halves = [x for x in jax.tree.leaves(state) if x.dtype == jnp.bfloat16]
    assert sum(x.size for x in halves) == sum(x.size for x in jax.tree.leaves(weights()))
    assert not any(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(run(optimizer=name)[2]))


def test_moments_in_8_bits_take_a_quarter_and_lead_the_same_way():
    old, exact, plain = run(steps=20)
    _, near, state = run(steps=20, moments="int8")
    assert isinstance(state[1], AdamInt8)
    assert WIDE < SMALL < WIDE * WIDE
    assert state[1].mu["unet"]["kernel"].dtype == jnp.int8
    assert state[1].nu["unet"]["kernel"].dtype == jnp.uint8
    assert state[1].mu["unet"]["bias"].dtype == jnp.float32  # it is small

    def size(tree):
        return sum(x.nbytes for x in jax.tree.leaves(tree))

    assert size(state) < 0.28 * size(plain)
    for part in ("unet", "text_encoder"):
        a, b = (np.asarray(x[part]["kernel"] - old[part]["kernel"]).ravel() for x in (exact, near))
        assert np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b) > 0.99
        assert 0.85 < np.linalg.norm(b) / np.linalg.norm(a) <= 1.02
    assert not np.array_equal(exact["unet"]["kernel"], near["unet"]["kernel"])


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "muon"])
def test_groups_have_their_own_rates(name):
    old, plain, _ = run(optimizer=name)
    _, new, _ = run(optimizer=name, rates=(("unet", 0.5), ("unet/bias", 0.0)))

    def moved(params):
        return jax.tree.map(lambda a, b: np.asarray(a - b), params, old)

    np.testing.assert_allclose(moved(new)["unet"]["kernel"], 0.5 * moved(plain)["unet"]["kernel"], rtol=1e-3, atol=1e-6)
    assert not moved(new)["unet"]["bias"].any()
    assert moved(plain)["unet"]["bias"].any()
    np.testing.assert_array_equal(new["text_encoder"]["kernel"], plain["text_encoder"]["kernel"])


def lora_weights() -> dict:
    layers = {"unet.conv.to_k": {"down": jnp.ones(2)}, "text_encoder.layers.0.q_proj": {"down": jnp.ones(2)}}
    return {**weights(), "lora": layers}


@pytest.mark.parametrize("prefix", ["text_encoder", "lora/text_encoder"])
def test_rates_of_a_lora_count_from_its_module(prefix):
    updates, _ = group_rates(((prefix, 0.0),)).update({"lora": lora_weights()["lora"]}, optax.EmptyState())
    sums = {name: float(layer["down"].sum()) for name, layer in updates["lora"].items()}
    assert sums == {"unet.conv.to_k": 2.0, "text_encoder.layers.0.q_proj": 0.0}


@pytest.mark.parametrize(
    ("trainable", "prefix", "good"),
    [
        (("unet",), "unet/ker", True),
        (("unet",), "unet/kernels", False),
        (("unet",), "uent", False),
        (("unet",), "text_encoder", True),  # as configs/finetune/full.py has it, for when it learns
        (("unet",), "text_encoder/gone", False),
        (("lora",), "lora/text_encoder", True),
        (("lora",), "unet.conv", True),
        (("lora",), "unet/kernel", False),  # its layers are named otherwise
    ],
)
def test_rates_of_nothing_are_refused(trainable, prefix, good):
    params = lora_weights() if "lora" in trainable else weights()
    if good:
        check_rates(((prefix, 0.1),), params, trainable)
    else:
        with pytest.raises(OptionsError, match=f"rates: '{prefix}' is the start of no parameter that learns, such as"):
            check_rates(((prefix, 0.1),), params, trainable)


def test_rates_of_a_lora_that_the_text_encoder_has_none_of_wait():
    params = lora_weights()
    del params["lora"]["text_encoder.layers.0.q_proj"]  # as configs/finetune/lora.py has it
    check_rates((("lora/text_encoder", 0.5),), params, ("lora",))


def test_a_run_with_rates_of_nothing_is_refused(tmp_path):
    stage = Stage("quadratic", ("unet",), lambda params, batch, keys: (params["unet"]["bias"].sum(), {}))
    for rates, said in (((("unte", 0.1),), "'unte'"), (("unet", 0.1), "must be pairs")):
        with pytest.raises(OptionsError, match=said):
            fit(stage, weights(), [], options(rates=rates), tmp_path)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "muon"])
def test_decay_is_every_optimizers(name):
    for part, changed in (("kernel", True), ("bias", False)):
        plain, decayed = (change(part, optimizer=name, weight_decay=decay) for decay in (0.0, 0.5))
        expected = -0.5e-2 * np.asarray(weights()["unet"][part]) * changed
        np.testing.assert_allclose(decayed - plain, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"optimizer": "sgd"}, "optimizer 'sgd'"),
        ({"moments": "int4"}, "moments 'int4'"),
        ({"optimizer": "lion", "moments": "int8"}, "moments 'int8' of lion"),
        ({"snapshot_every": 0}, "snapshot_every"),
    ],
)
def test_optimizers_that_cannot_be_are_named(changes, named):
    with pytest.raises(OptionsError, match=named):
        options(**changes).check(1)


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
        found = ema.reconstructed(tmp_path, sigma, params)["unet"]["w"]
        error = np.abs(found - average["unet"]["w"]).max() / spread
        assert error < 0.12, (sigma, error)
        if sigma not in sigmas:  # nearer than what was tracked, by far
            for tracked in state.averages:
                assert error < 0.3 * np.abs(tracked["unet"]["w"] - average["unet"]["w"]).max() / spread
    # The end of the training may be chosen too.
    earlier = ema.reconstructed(tmp_path, 0.05, params, updates=200)["unet"]["w"]
    again = ema.open_tensors(tmp_path / "200.safetensors").read("0.05:unet/w")
    np.testing.assert_allclose(earlier, again, atol=1e-3 * spread)
    with pytest.raises(ConfigError, match="no snapshots"):
        ema.reconstructed(tmp_path / "none", 0.1, params)
    with pytest.raises(ConfigError, match="another model: it has no unet/w"):
        ema.reconstructed(tmp_path, 0.1, {"unet": {"v": walk[0]}})


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
    average = ema.reconstructed(tmp_path / "ema", 0.1, result.params)["unet"]["w"]
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


def test_clipping_is_that_of_optax_and_keeps_no_second_gradient():
    grads = {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.full(4, -3.0)}
    for limit in (1.0, 100.0):
        ours, theirs = (
            tx.update(grads, tx.init(grads))[0] for tx in (clip_by_global_norm(limit), optax.clip_by_global_norm(limit))
        )
        for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-6)
    assert not np.any(clip_by_global_norm(1.0).update(jax.tree.map(jnp.zeros_like, grads), optax.EmptyState())[0]["a"])

    def temporaries(clip):
        """Bytes of a program that makes a gradient of 1 MiB and updates AdamW's moments with it."""
        tx = optax.chain(clip(1.0), optax.adam(1.0))
        params = {"w": jax.ShapeDtypeStruct((512, 512), jnp.float32)}

        def step(params, state, x):
            return tx.update(jax.grad(lambda p: ((x @ p["w"]) ** 2).sum())(params), state)

        args = params, jax.eval_shape(tx.init, params), jax.ShapeDtypeStruct((8, 512), jnp.float32)
        return jax.jit(step, donate_argnums=1).lower(*args).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(clip_by_global_norm) <= temporaries(optax.clip_by_global_norm) - 2**19
