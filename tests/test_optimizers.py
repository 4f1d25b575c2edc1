"""Every optimizer makes its own update: moments in few bits, rates of groups, decay, clipping."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdiff.training.loop import Stage, fit
from jaxdiff.training.optimizer import (
    MIN_QUANTIZED,
    AdamInt8,
    check_multipliers,
    clip_by_global_norm,
    optimizer,
    scale_by_multipliers,
)
from jaxdiff.training.options import OptionsError
from tests.support.stages import options

WIDE = 128


def weights() -> dict:
    rng = np.random.default_rng(0)
    shapes = {"unet": {"kernel": (WIDE, WIDE), "bias": (WIDE,)}, "text_encoder": {"kernel": (3, 3, 32, 32)}}
    return jax.tree.map(
        lambda s: jnp.asarray(rng.normal(size=s), jnp.float32), shapes, is_leaf=lambda s: isinstance(s, tuple)
    )


@functools.cache
def updates_of(**changes):
    """(optimizer, step of it on a quadratic whose curvature differs by row), each compiled once."""
    tx = optimizer(options(**{"learning_rate": 1e-2, "clip_norm": 0.0, "schedule": "constant", **changes}))

    @jax.jit
    def step(p, state):
        grads = jax.tree.map(lambda x: x * jnp.linspace(0.01, 1.0, x.shape[0]).reshape(-1, *[1] * (x.ndim - 1)), p)
        updates, state = tx.update(grads, state, p)
        return optax.apply_updates(p, updates), state

    return tx, step


@functools.cache
def run(steps: int = 1, **changes):
    """(parameters before, after, state of the optimizer)."""
    tx, step = updates_of(**changes)
    params = new = weights()
    state = tx.init(params)
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
    state = run(optimizer=name, moment_dtype="bfloat16")[2]
    halves = [x for x in jax.tree.leaves(state) if x.dtype == jnp.bfloat16]
    assert sum(x.size for x in halves) == sum(x.size for x in jax.tree.leaves(weights()))
    assert not any(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(run(optimizer=name)[2]))


def test_moments_in_8_bits_take_a_quarter_and_lead_the_same_way():
    old, exact, plain = run(steps=20)
    _, near, state = run(steps=20, moment_dtype="int8")
    assert isinstance(state[1], AdamInt8)
    assert WIDE < MIN_QUANTIZED < WIDE * WIDE
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
    _, new, _ = run(optimizer=name, lr_multipliers=(("unet", 0.5), ("unet/bias", 0.0)))

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
    updates, _ = scale_by_multipliers(((prefix, 0.0),)).update({"lora": lora_weights()["lora"]}, optax.EmptyState())
    sums = {name: float(layer["down"].sum()) for name, layer in updates["lora"].items()}
    assert sums == {"unet.conv.to_k": 2.0, "text_encoder.layers.0.q_proj": 0.0}


NAMES = (
    "text_encoder/embedding", "text_encoder_2/embedding", "unet/down_blocks_0/resnets_0/conv1/kernel",
    "unet/down_blocks_1/resnets_0/conv1/kernel", "unet/down_blocks_10/resnets_0/conv1/kernel", "unet/conv_in/kernel",
    "lora/text_encoder.layers.0.fc1/down", "lora/text_encoder_2.layers.0.fc1/down", "lora/unet.blocks.1.fc1/down",
    "lora/unet.blocks.10.fc1/down",
)  # fmt: skip


@pytest.mark.parametrize(
    ("prefix", "of"),
    [
        ("text_encoder", (0, 6)),
        ("text_encoder_2", (1, 7)),
        ("lora/text_encoder_2", (1, 7)),
        ("lora", (6, 7, 8, 9)),
        ("unet", (2, 3, 4, 5, 8, 9)),
        ("unet/", (2, 3, 4, 5, 8, 9)),
        ("unet/down_blocks", (2, 3, 4)),
        ("unet/down_blocks_1", (3,)),
        ("unet/conv_in", (5,)),
        ("unet/conv", ()),
        ("unet.blocks", (8, 9)),
        ("lora/unet.blocks.1", (8,)),
    ],
)
def test_rates_are_of_whole_names(prefix, of):
    """ "text_encoder" moved the rate of "text_encoder_2" as well, and block 1 that of block 10."""
    params: dict = {}
    for name in NAMES:
        *folders, last = name.split("/")
        functools.reduce(lambda tree, key: tree.setdefault(key, {}), folders, params)[last] = jnp.ones(())
    updates, _ = scale_by_multipliers(((prefix, 0.5),)).update(params, optax.EmptyState())
    assert [i for i, name in enumerate(NAMES) if functools.reduce(dict.get, name.split("/"), updates) == 0.5] == [*of]


@pytest.mark.parametrize(
    ("trainable", "prefix", "good"),
    [
        (("unet",), "unet/kernel", True),
        (("unet",), "unet/ker", False),
        (("unet",), "text_encoder_2", True),  # as configs/finetune/full.py has it, for models that have a second one
        (("unet",), "text_encoder_2/kernel", False),
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
        check_multipliers(((prefix, 0.1),), params, trainable)
    else:
        with pytest.raises(OptionsError, match=f"lr_multipliers: no trained parameter begins with '{prefix}'"):
            check_multipliers(((prefix, 0.1),), params, trainable)


def test_rates_of_a_lora_that_the_text_encoder_has_none_of_wait():
    params = lora_weights()
    del params["lora"]["text_encoder.layers.0.q_proj"]  # as configs/finetune/lora.py has it
    check_multipliers((("lora/text_encoder", 0.5),), params, ("lora",))


def test_a_run_with_rates_of_nothing_is_refused(tmp_path):
    stage = Stage("quadratic", ("unet",), lambda params, batch, keys: (params["unet"]["bias"].sum(), {}))
    for rates, said in (((("unte", 0.1),), "'unte'"), (("unet", 0.1), "must be pairs")):
        with pytest.raises(OptionsError, match=said):
            fit(stage, weights(), [], options(lr_multipliers=rates), tmp_path)


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
        ({"moment_dtype": "int4"}, "moment_dtype 'int4'"),
        ({"optimizer": "lion", "moment_dtype": "int8"}, "moment_dtype 'int8' of lion"),
        ({"snapshot_every": 0}, "snapshot_every"),
    ],
)
def test_optimizers_that_cannot_be_are_named(changes, named):
    with pytest.raises(OptionsError, match=named):
        options(**changes).check(1)


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
