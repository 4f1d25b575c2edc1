"""A step of training against PyTorch diffusers and peft: the loss for equal noises and times, and its gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdiff
from jaxdiff.io.lora import save_lora
from jaxdiff.io.tensor_files import named_tensors
from jaxdiff.training import adapters
from jaxdiff.training.options import NoiseOptions
from jaxdiff.training.stages import random_noise, random_times
from jaxdiff.training.trainables import make
from tests.support.stages import settings

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")

from tests.support import oracle, pipelines  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers' and peft's own
TEXTS = ["a castle", "a red dragon", "blurry"]
RANK, ALPHA = 2, 3.0
# Networks of these sizes agree within 1e-5 (tests/test_models.py); a gradient goes through them there and back, and is
# a product of what either way gives.
TOLERANCE = 4e-5


def theirs(pipe, batch, x0, eps, t, kind):
    """The loss as diffusers' training scripts have it (train_text_to_image_lora, …_lora_sdxl); nchw tensors."""
    noise_scheduler = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
    noised = noise_scheduler.add_noise(x0, eps, t)
    ids = torch.from_numpy(np.asarray(batch["tokens"])).long()
    if "tokens_2" in batch:
        ids_2 = torch.from_numpy(np.asarray(batch["tokens_2"])).long()
        first = pipe.text_encoder(ids, output_hidden_states=True)
        second = pipe.text_encoder_2(ids_2, output_hidden_states=True)
        states = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1)
        side = float(2 * x0.shape[-1])
        time_ids = torch.tensor([[side, side, 0.0, 0.0, side, side]]).repeat(len(x0), 1)
        added = {"text_embeds": second[0], "time_ids": time_ids}
    else:
        states, added = pipe.text_encoder(ids)[0], None
    output = pipe.unet(noised, t, states, added_cond_kwargs=added).sample
    target = eps if kind == "epsilon" else noise_scheduler.get_velocity(x0, eps, t)
    return torch.nn.functional.mse_loss(output, target)


def distance(a, b):
    """Between two trees {name: array}, relative to the second's norm; both must have the same names."""
    assert a.keys() == b.keys()
    square = sum(float(((a[n] - b[n]) ** 2).sum()) for n in a)
    return np.sqrt(square / sum(float((b[n] ** 2).sum()) for n in b))


@pytest.mark.parametrize(
    ("name", "kind"), [pytest.param("sd1", "v_prediction", marks=pytest.mark.slow), ("sdxl", "epsilon")]
)
def test_loss_and_gradients_equal_pytorchs(name, kind, tmp_path):
    """Of a LoRA of the UNet and all text encoders, and of the UNet's own weights beneath it, as in full training."""
    pipe = pipelines.pipeline(name, tmp_path / "parts", kind)
    pipe.save_pretrained(tmp_path / "model")
    model, params = jaxdiff.load(tmp_path / "model")
    encoders = [n for n in ("text_encoder", "text_encoder_2") if n in params]
    config = settings("lora", trainable=("unet", *encoders), lora={"rank": RANK, "alpha": ALPHA})
    target = make(config, model, params)
    rng = np.random.default_rng(0)
    params = dict(target.params)
    params["lora"] = jax.tree.map(lambda x: 0.1 * rng.standard_normal(x.shape, np.float32), params["lora"])
    keys = jax.random.split(jax.random.key(0), len(TEXTS))
    batch = target.stage.prepare({"text": TEXTS, "image": np.zeros((3, 1), np.uint8)})
    batch = {n: x for n, x in batch.items() if n != "image"} | {
        "latents": rng.standard_normal((3, 8, 8, 4), np.float32)
    }

    def loss(chosen):
        return target.stage.loss({**params, **chosen}, batch, keys)[0]

    value, grads = jax.jit(jax.value_and_grad(loss))({n: params[n] for n in ("lora", "unet")})

    save_lora(tmp_path / "lora.safetensors", model, adapters.lora_of(params, ALPHA), "kohya")
    pipe.load_lora_weights(str(tmp_path), weight_name="lora.safetensors")
    modules = {n: getattr(pipe, n) for n in ("unet", *encoders)}
    for module in modules.values():
        module.requires_grad_(True)
    time_keys, noise_keys, _ = jnp.moveaxis(jax.vmap(lambda k: jax.random.split(k, 3))(keys), 1, 0)
    t = np.asarray(random_times(model.scheduler, time_keys, NoiseOptions()))
    eps = random_noise(noise_keys, (8, 8, 4))
    expected = theirs(
        pipe, batch, oracle.nchw(batch["latents"]), oracle.nchw(eps), torch.from_numpy(t.astype(np.int64)), kind
    )
    expected.backward()
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)

    found, weights = {}, {}
    for part, module in modules.items():
        for path, p in module.named_parameters():
            path = path.removeprefix("text_model.")
            grad = np.zeros(p.shape, np.float32) if p.grad is None else p.grad.numpy()  # SDXL passes last layers by
            if ".lora_" in path:
                layer, _, role = path.partition(".lora_")
                found[f"{part}.{layer}.{role[0]}"] = grad
            elif part == "unet":
                weights[path.replace(".base_layer", "")] = grad
    ours = {f"{n}.A": np.asarray(f["down"]).T for n, f in grads["lora"].items()}
    ours |= {f"{n}.B": np.asarray(f["up"]).T for n, f in grads["lora"].items()}
    assert {n.partition(".")[0] for n in ours} == set(modules)
    for part in modules:
        for role in "AB":
            mine, yours = (
                {n: x for n, x in g.items() if n.startswith(f"{part}.") and n[-1] == role} for g in (ours, found)
            )
            assert distance(mine, yours) < TOLERANCE, (part, role)
    assert distance(dict(named_tensors(grads["unet"])), weights) < TOLERANCE
