"""Plans say what a run then holds."""

import importlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from jaxdiff import parallel
from jaxdiff.cli import train, train_plan
from jaxdiff.cli.train_plan import describe
from jaxdiff.models.unet import UNet2DConditionModel
from jaxdiff.training import memory_plan
from jaxdiff.training.optimizer import optimizer
from jaxdiff.training.options import Options, OptionsError
from jaxdiff.training.stages import diffusion_stage
from jaxdiff.training.train_step import abstract_state, cast_frozen, init_state, sharded
from jaxdiff.training.trainables import make
from tests.support.networks import SDXL
from tests.support.processes import CONFIG, ROOT
from tests.support.tiny import SIDE

ONE_FILE = ROOT / "jaxdiff" / "bundled" / "icons" / "unet" / "diffusion_pytorch_model.safetensors"


def test_planned_bytes_are_those_of_a_real_state(tiny):
    model, params = tiny
    stage, options = diffusion_stage(model), Options(steps=1, batch_size=2)
    mesh = parallel.mesh(devices=jax.devices()[:1])
    trained = {k: params[k] for k in stage.trainable}
    frozen = sharded(mesh, {k: v for k, v in params.items() if k not in trained})
    read = {"image": np.zeros((1, SIDE, SIDE, 3), np.uint8), "text": [""]}
    held = memory_plan.memory(
        abstract_state(trained, options, mesh), frozen, memory_plan.abstract_batch(stage, read, 2, mesh)
    )
    state = init_state(trained, optimizer(options), mesh)
    for found, tree in ((held.params, state.params), (held.optimizer, state.opt_state), (held.average, state.ema)):
        assert found == sum(x.nbytes for x in jax.tree.leaves(tree))
    assert held.frozen == sum(x.nbytes for k in frozen for x in jax.tree.leaves(params[k]))
    assert held.batch == 2 * (SIDE * SIDE * 3 + 4 * model.tokenizer.max_length)
    assert held.gradients == held.params


@pytest.fixture(scope="module")
def configs_alone(tiny_folder, tmp_path_factory):
    """The tiny model's folder without its weights."""
    folder = tmp_path_factory.mktemp("configs") / "tiny"
    shutil.copytree(tiny_folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "configs" / "finetune").glob("*.py")))
def test_what_is_planned_for_fine_tuning_is_what_is_made(name, configs_alone, tiny):
    config = importlib.import_module(f"configs.finetune.{name}").get_config()
    config.init_from.model, config.textual_inversion.initial = str(configs_alone), "castle"
    if name == "controlnet":
        config.controlnet.init_from = "elsewhere"  # whose weights are not read either
    stage, shapes, _ = describe(config)
    config.controlnet.init_from = ""
    target = make(config, *tiny)
    made = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), target.params)
    assert shapes == made
    assert stage.trainable == target.stage.trainable
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(target.params))  # no memory of a device
    assert "all but activations" in train_plan.text(config, "quick", 4)


def test_of_a_lora_the_frozen_weights_are_held_once_and_have_no_optimizer(configs_alone, tiny):
    config = importlib.import_module("configs.finetune.lora").get_config()
    config.init_from.model = str(configs_alone)
    stage, shapes, _ = describe(config)
    options = Options.from_config(config)
    mesh = parallel.mesh(devices=jax.devices()[:1])
    frozen = {k: v for k, v in shapes.items() if k not in stage.trainable}
    frozen = sharded(mesh, jax.eval_shape(lambda x: cast_frozen(x, options), frozen))
    held = memory_plan.memory(abstract_state({"lora": shapes["lora"]}, options, mesh), frozen, {})

    target = make(config, *tiny)
    state = init_state({"lora": target.params["lora"]}, optimizer(options), mesh)
    assert held.params == held.gradients == sum(x.nbytes for x in jax.tree.leaves(state.params))
    assert held.optimizer == sum(x.nbytes for x in jax.tree.leaves(state.opt_state))
    assert held.average == sum(x.nbytes for x in jax.tree.leaves(state.ema))
    assert held.frozen == sum(x.nbytes for x in jax.tree.leaves(tiny[1])) / 2  # in bfloat16
    assert held.optimizer < 3 * held.params < held.frozen


@pytest.mark.slow
def test_sdxl_is_planned_on_a_pod_without_allocating_it():
    unet = UNet2DConditionModel(SDXL)
    array = jax.ShapeDtypeStruct
    inputs = [array(s, np.float32) for s in ((1, 8, 8, 4), (1,), (1, 2, 2048), (1, 1280), (1, 6))]
    params = {"unet": jax.eval_shape(unet.init, jax.random.key(0), *inputs)["params"]}
    count = sum(x.size for x in jax.tree.leaves(params))
    assert count == 2_567_463_684  # as diffusers has it
    options = Options(steps=1, batch_size=64, fsdp=64)
    held = memory_plan.memory(abstract_state(params, options, memory_plan.abstract_mesh(64, fsdp=64)), {}, {})
    vectors = sum(x.size for x in jax.tree.leaves(params) if x.ndim < 2)
    odd = sum(x.size for x in jax.tree.leaves(params) if x.ndim > 1 and not any(n % 64 == 0 for n in x.shape))
    assert odd == 0
    assert held.params == 4 * ((count - vectors) / 64 + vectors)
    assert held.average == held.params
    # Two moments, and the counts of Adam and of the schedule.
    assert 0 <= held.optimizer - 2 * held.params <= 16


def test_a_mesh_that_does_not_fit_is_refused():
    with pytest.raises(OptionsError, match="fsdp 3 x tensor 1 must divide the number of devices, 8"):
        memory_plan.abstract_mesh(8, fsdp=3)


@pytest.fixture
def cli(monkeypatch, capsys):
    def run(*args: object) -> tuple[int, str, str]:
        argv = ["train.py", *map(str, args)]
        monkeypatch.setattr(sys, "argv", argv)
        return train.main(argv), *capsys.readouterr()

    return run


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
@pytest.mark.parametrize("stage", ["clip", "vae", "vae_decoder", "gan", "unet"])
def test_train_prints_a_plan_without_data_or_a_workdir(cli, stage):
    code, out, err = cli(
        f"--config={CONFIG}:{stage}", "--plan=quick", "--plan_devices=4", "--config.fsdp=2", "--config.tensor=2"
    )
    assert code == 0, err
    assert "GB a device, of 4 devices (data 1 x fsdp 2 x tensor 2)" in out
    assert "all but activations" in out


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--plan=small"], "--plan=small must be quick or full"),
        (["--plan=quick", "--plan_devices=3"], "batch_size 4 must be divisible"),
        (["--plan=quick", "--plan_devices=4", "--config.fsdp=3"], "fsdp 3 x tensor 1 must divide"),
        (
            ["--plan=quick", f"--config.init_from.model={ONE_FILE}"],
            "holds a UNet of a diffusers folder: put it into one",
        ),
        (["--plan=quick", "--plan_devices=-1"], "--plan_devices=-1 must be at least 1"),
        (["--workdir=x", "--coordinator_address=localhost:1"], "--coordinator_address needs --num_processes"),
        (["--workdir=x", "--process_id=1"], "need --coordinator_address"),
    ],
)
def test_what_cannot_be_planned_is_said_in_a_sentence(cli, flags, message):
    code, _, err = cli(f"--config={CONFIG}:unet", *flags)
    assert code == (1 if any("init_from" in flag for flag in flags) else 2)
    assert message in err
    assert "Traceback" not in err


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_a_full_plan_that_fails_on_simulated_devices_ends_with_its_exit_code(cli, monkeypatch):
    ended = subprocess.CompletedProcess([], 3)
    monkeypatch.setattr(train_plan.subprocess, "run", lambda *args, **kwargs: ended)
    code, *_ = cli(f"--config={CONFIG}:unet", "--plan", f"--plan_devices={jax.device_count() + 1}")
    assert code == 3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_a_full_plan_compiles_for_devices_that_are_not_there(capfd, monkeypatch):
    argv = ["train.py", f"--config={CONFIG}:unet", "--plan", "--plan_devices=4", "--config.fsdp=4"]
    monkeypatch.setattr(sys, "argv", argv)
    assert train.main(argv) == 0
    out = capfd.readouterr().out
    assert "activations and gathered parameters" in out
    assert "| all-gather | fsdp | 4 |" in out
    assert "TFLOP a device" in out


def test_the_report_is_of_the_state_that_is_trained(tiny):
    _, params = tiny
    mesh = memory_plan.abstract_mesh(8, fsdp=4)
    trained = {"unet": params["unet"]}
    held = memory_plan.memory(abstract_state(trained, Options(steps=1, batch_size=8), mesh), {}, {})
    step = memory_plan.Step(temporary=10**9 + held.gradients, flops=1e12, sent=[])
    text = memory_plan.report(held, step, mesh, trained)
    total = (held.params + held.optimizer + held.average + held.gradients + 10**9) / 1e9
    assert f"  {'all':36} {total:8.3f}" in text.splitlines()
    assert "1.000 TFLOP a device" in text
