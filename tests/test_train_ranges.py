"""Settings of train.py that cannot be right are refused by name, and nothing is written for them."""

import dataclasses
import importlib
from pathlib import Path

import pytest

from jaxdiff.cli import train
from jaxdiff.cli.errors import UsageError
from jaxdiff.cli.train_flags import parse
from jaxdiff.config import ConfigError
from jaxdiff.errors import WeightsError
from jaxdiff.training import super_resolution, trainables
from jaxdiff.training.checks import check_settings, too_long
from jaxdiff.training.defaults import RULES, as_json, base
from jaxdiff.training.init import described_model
from jaxdiff.training.loop import fit
from jaxdiff.training.optimizer import check_multipliers, learning_rate
from jaxdiff.training.options import NoiseOptions, Options, OptionsError, default_warmup
from jaxdiff.training.ranges import leaves
from jaxdiff.training.run import build_run
from jaxdiff.training.run_data import fingerprints
from jaxdiff.training.workdir import WorkdirError, claimed, settle
from tests.support.line import LINE, linear_stage
from tests.support.processes import CONFIG, ROOT
from tests.support.stages import options, settings
from tests.support.training_config import get_config
from tests.support.written import existing, write_squares

# ml_collections loads configs by a method that Python has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
NAN, INF = float("nan"), float("inf")


def changed(name, value, stage="unet"):
    """A config with one setting, whatever its type."""
    config = settings(stage)
    group, _, last = name.rpartition(".")
    with config.ignore_type():
        (config[group] if group else config)[last] = value
    return config


# --- ranges


def test_every_setting_of_a_number_has_a_range():
    numbers = {name: field for name, field in RULES.items() if dataclasses.is_dataclass(field) is False}
    kinds = {name: field.metadata["kind"] for name, field in numbers.items() if isinstance(field, dataclasses.Field)}
    assert kinds["learning_rate"] is kinds["data.filter.max_aspect"] is float
    assert kinds["warmup_steps"] is kinds["lora.rank"] is int
    for name, kind in kinds.items():
        if kind in (int, float):
            rule = RULES[name].metadata
            assert max(rule["low"], rule["above"]) > -INF, name
    assert set(dict(leaves(base().to_dict()))) == set(RULES)


@pytest.mark.parametrize("name", [n for n, field in RULES.items() if isinstance(field, dataclasses.Field)])
def test_what_no_setting_can_be(name):
    """Found by going through all of them, so that a new one is among them."""
    kind = RULES[name].metadata["kind"]
    bad = {int: (-1, 1.5, True, "64", 2**40), float: (-1000.5, NAN, INF, -INF, "0.1"), bool: (1, "yes")}
    bad |= {str: (5, None, ("a",)), tuple: (5, "a castle")}
    for value in bad[kind]:
        with pytest.raises(OptionsError, match=rf"^{name.replace('.', '[.]')} .* must be .*\.$") as error:
            check_settings(changed(name, value))
        assert repr(value) in str(error.value)
    check_settings(settings("unet"))


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("caption_dropout", 1.5, "caption_dropout 1.5 must be from 0 to 1."),
        ("learning_rate", 0.0, "learning_rate 0.0 must be above 0 and at most 1000."),
        ("b2", 1.0, "b2 1.0 must be at least 0 and below 1."),
        ("ema_sigmas", (0.05, 0.3), "ema_sigmas (0.05, 0.3) must be above 0 and below 0.2887."),
        ("ema_sigmas", ("a",), "ema_sigmas ('a',) must be a tuple, each above 0"),
        ("seed", 2**32, "seed 4294967296 must be from 0 to 4294967292."),
        ("dtype", "float64", "dtype 'float64' must be one of float32, bfloat16, float16."),
        ("remat", "all", "remat 'all' must be one of '' (none), full, dots"),
        ("eval.scheduler", "dpm", "eval.scheduler 'dpm' must be one of ddim"),
        ("prediction_type", "v", "prediction_type 'v' must be one of '' (none), epsilon"),
        ("data.background", "blue", "data.background 'blue' must be one of random, white."),
        ("data.filter.duplicates", "all", "data.filter.duplicates 'all' must be one of"),
        ("data.captions", ("a", 1), "data.captions ('a', 1) must be a tuple of text, such as \"('a castle',)\"."),
        (
            "trainable",
            ("unett",),
            "trainable ('unett',) must be one of unet, transformer, text_encoder, text_",
        ),
        ("data.filter.license", "CC0", "data.filter.license 'CC0' must be a tuple of the values"),
        ("data.filter.license", ("CC0",), None),
        ("lr_multipliers", (("unet", NAN),), "each factor must be from 0"),
        ("lr_multipliers", (("unet", -1.0),), "each factor must be from 0"),
        ("lr_multipliers", (("unet", "a"),), "must be pairs such as"),
        ("cache_latents", 2, None),
        ("warmup_steps", None, None),
    ],
)
def test_settings_that_cannot_be_right_say_their_range(name, value, said):
    if said is None:
        return check_settings(changed(name, value))
    with pytest.raises(OptionsError) as error:
        check_settings(changed(name, value))
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"cache_latents": 1, "latents": {"path": "x"}}, "latents.path=x does not go with cache_latents=1"),
        ({"cache_latents": 1, "prior_preservation": {"path": "x"}}, "does not go with prior_preservation.path=x"),
        ({"data": {"buckets": 64}, "prior_preservation": {"path": "x"}}, "data.buckets=64 does not go with"),
        ({"batch_size": 1, "prior_preservation": {"path": "x"}}, "batch_size must be 2 or more"),
        ({"controlnet": {"canny_low": 300.0}}, "controlnet.canny_low 300.0 must be at most controlnet.canny_high"),
        ({"model": {"unett": {}}}, "model.unett is no part of a model: did you mean unet?"),
        ({"model": {"unet": {"layer_per_block": 1}}}, "did you mean model.unet.layers_per_block"),
        ({"model": {"vae": {"block_out_channels": (8, -8)}}}, "model.vae.block_out_channels (8, -8) must be a number"),
        ({"model": {"text_encoder": {"hidden_size": "64"}}}, "model.text_encoder.hidden_size '64' must be a number"),
    ],
)
def test_settings_that_do_not_go_together(changes, said):
    config = settings("unet")
    for name, value in changes.items():
        config[name].update(value) if isinstance(value, dict) else config.update({name: value})
    with pytest.raises(OptionsError) as error:
        check_settings(config)
    assert said in str(error.value)


def test_a_new_word_starts_from_something():
    config = settings("textual_inversion")
    config.textual_inversion.initial = ""
    with pytest.raises(OptionsError, match=r"textual_inversion needs a token, the new word, and initial"):
        check_settings(config)


def test_options_of_python_have_the_same_ranges():
    for changes in ({"learning_rate": NAN}, {"steps": "60"}, {"weight_decay": -1.0}, {"keep_checkpoints": 0}):
        with pytest.raises(OptionsError, match=f"^{next(iter(changes))} "):
            options(**changes).check(1)
    with pytest.raises(OptionsError, match=r"^fsdp 3 x tensor 1 must divide the number of devices, 4"):
        options(fsdp=3).check(4)
    with pytest.raises(OptionsError, match=r"^caption_dropout 1.5 must be from 0 to 1"):
        NoiseOptions(caption_dropout=1.5)
    with pytest.raises(OptionsError, match=r"are 0 for every trained parameter"):
        check_multipliers((("unet", 0.0),), {"unet": {"bias": 1.0}}, ("unet",))


# --- names


def flags(*args):
    return parse(["train.py", f"--config={CONFIG}:unet", "--workdir=x", "--config.data.path=y", *args])


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--config.lr=1", r"^--config\.lr is no setting: did you mean learning_rate or lr_multipliers\?"),
        ("--config.data.size=16", r"^--config\.data\.size is no setting: did you mean data\.image_size"),
        ("--config.stpes=3", r"did you mean steps"),
        ("--config.lora.rnk=4", r"did you mean lora\.rank\?"),
        ("--config.resolution=512", r"did you mean data\.image_size\?"),
        ("--config.qzx=1", r"^--config\.qzx is no setting: docs/training\.md"),
        ("--config.data=5", r"^--config\.data is a group of settings: give one of them, such as --config\.data\.path"),
        ("--config.data.path.x=3", r"did you mean data\.path"),
        ("--config.model.unet.foo=3", r"^--config gives no 'foo'"),
        ("--steps=3", r"^--steps is no flag: did you mean config\.steps"),
        ("--wrkdir=3", r"^--wrkdir is no flag: did you mean workdir"),
        ("--config.steps=1e4", r"^--config\.steps=1e4 must be a whole number, from 1 to"),
        ("--config.learning_rate=x", r"^--config\.learning_rate=x must be a number, above 0 and at most 1000"),
        ("--config.data.flip=maybe", r"^--config\.data\.flip=maybe must be True or False"),
        ("--config.eval.prompts=a castle", r"""^--config\.eval\.prompts=a castle must be .*"\('a castle',\)"\.$"""),
        ("--profile=3", r"^--profile=3 begins with the third step: config\.steps is 4"),
    ],
)
def test_a_flag_that_cannot_be_right(flag, said):
    with pytest.raises(UsageError, match=said):
        flags(flag)


def test_names_that_a_config_misspells_or_lacks():
    config = get_config("unet")
    config.lr = 1e-3
    with pytest.raises(OptionsError, match=r"^lr is no setting: did you mean learning_rate"):
        check_settings(config)
    del config.lr, config.data["image_size"]
    with pytest.raises(OptionsError, match=r"^data\.image_size is missing: begin the config with .*base"):
        check_settings(config)


def test_a_tilde_is_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    paths = ["data.path", "init_from.model", "init_from.vae", "prior_preservation.path", "controlnet.init_from"]
    f = flags("--workdir=~/runs", *(f"--config.{name}=~/x" for name in paths))
    assert f.workdir == f"{tmp_path}/runs"
    assert {f.config[name] for name in paths} == {f"{tmp_path}/x"}
    assert flags("--config.init_from.model=owner/name").config.init_from.model == "owner/name"
    (tmp_path / "mine.py").write_text(Path(CONFIG).read_text())
    assert parse(["train.py", "--config=~/mine.py:vae", "--workdir=x", "--config.data.path=y"]).config.stage == "vae"


# --- runs that are shorter than their warm-up


@pytest.mark.parametrize("steps", [1, 19, 60, 1000, 10_000, 10**6])
def test_the_default_warm_up_ends_in_any_run(steps):
    o = Options(steps=steps, schedule="constant")
    assert o.warmup == min(500, steps // 20)
    assert float(learning_rate(o)(o.warmup)) == pytest.approx(o.learning_rate)
    assert o.too_long() == []


def test_short_runs_of_the_configs_reach_their_rate():
    for path in [*sorted((ROOT / "configs" / "finetune").glob("*.py")), ROOT / "configs" / "folder.py"]:
        config = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts)).get_config()
        long = Options.from_config(config)
        assert long.warmup in (0, default_warmup(long.steps)), path
        f = parse(["train.py", f"--config={path}", "--workdir=x", "--config.data.path=y", "--config.steps=60"])
        assert f.config.warmup_steps in (0, 3)  # the number itself, for run.json
    f = parse(["train.py", "--config=lora", "--workdir=x", "--config.data.path=y", "--config.warmup_steps=7"])
    assert (f.config.warmup_steps, f.config.steps) == (7, 2000)


def test_a_warm_up_that_was_given_is_warned_of(tmp_path, caplog):
    o = options(steps=60, warmup_steps=500, ema_sigmas=(0.05, 0.1))
    with pytest.raises(TypeError):  # it ends at data that there are not
        fit(linear_stage(), LINE, None, o, tmp_path)
    assert "config.warmup_steps 500 is not below config.steps 60: the learning rate never reaches" in caplog.text
    assert "config.snapshot_every 1000 is not below config.steps 60" in caplog.text


@pytest.mark.parametrize(
    ("stage", "group", "name"), [("scm", "distillation", "tangent_warmup"), ("vae_decoder", "adversary", "start")]
)
def test_other_phases_that_a_run_never_reaches_are_warned_of(stage, group, name, caplog):
    config = changed("stage", stage)
    config.update({"steps": 60, group: {name: 60}})
    with pytest.raises(ConfigError):  # it ends at data that there are not
        build_run(config, Path("x"))
    assert f"config.{group}.{name} 60 is not below config.steps 60: " in caplog.text
    assert len(too_long(config)) == 1
    config.steps = 61
    assert too_long(config) == []


def test_a_warm_up_that_nobody_gave_grows_with_the_steps(tmp_path):
    def go_on(steps, warmup):
        settle(tmp_path, as_json(changed("warmup_steps", warmup)) | {"steps": steps}, {}, as_json(base()))

    go_on(2000, 100)
    (tmp_path / "checkpoints" / "10").mkdir(parents=True)
    go_on(4000, 200)
    with pytest.raises(WorkdirError, match="warmup_steps: 200 -> 7"):
        go_on(4000, 7)


# --- what a setting names is not there


@pytest.mark.parametrize(
    "setting",
    ["data.path", "data.eval_split", "prior_preservation.path", "super_resolution.photographs", "latents.path"],
)
@pytest.mark.parametrize("value", ["nowhere", "nowhere/a.parquet", "nowhere/{000..001}.tar"])
def test_data_that_are_not_there_name_their_flag(setting, value, tmp_path):
    (tmp_path / "data").mkdir()
    config = base()
    config.data.path = str(write_squares(tmp_path / "data"))
    config.update_from_flattened_dict({setting: value})
    group = config[setting.partition(".")[0]]
    for captions in ((), ("a square",)) if setting.endswith(".path") and setting != "latents.path" else ((),):
        if captions:  # of all images, which then need none of their own
            group.captions = captions
        with pytest.raises(ConfigError, match=rf"^--config\.{setting}: .*nowhere") as error:
            fingerprints(config)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", ["nowhere", "nowhere.safetensors", "{tmp}/empty.safetensors", "{tmp}"])
@pytest.mark.parametrize("entry", ["model", "text_encoder", "unet", "vae", "vision_encoder", "upscaler"])
def test_models_that_are_not_there_name_their_flag(entry, value, tmp_path):
    (tmp_path / "empty.safetensors").write_bytes(b"")
    value = value.format(tmp=tmp_path)
    config = base()
    config.init_from.update({"model": "icons", entry: value})

    def read():
        if entry == "upscaler":
            return super_resolution.network_config(config)
        return described_model({}, config.init_from.to_dict(), lambda: None)

    with pytest.raises((ConfigError, WeightsError), match=rf"^--config\.init_from\.{entry}: ") as error:
        read()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("setting", "stage"),
    [
        ("controlnet.init_from", "controlnet"),
        pytest.param("adversary.init_from", "vae_decoder", marks=pytest.mark.slow),
    ],
)
def test_networks_that_are_not_there_name_their_flag(setting, stage, tiny):
    config = base()
    config.stage = stage
    config.update_from_flattened_dict({setting: "nowhere.safetensors"})
    with pytest.raises((ConfigError, WeightsError), match=rf"^--config\.{setting}: nowhere.safetensors does not exist"):
        trainables.make(config, *tiny)


# --- nothing is left of a run that is refused


@pytest.fixture
def data(tmp_path):
    (tmp_path / "data").mkdir()
    return write_squares(tmp_path / "data")


def test_a_refused_run_leaves_nothing(train_cli, data, tmp_path):
    args = [f"--config={CONFIG}:unet", f"--config.data.path={data}", "--config.data.filter.min_caption=1"]
    refused = {
        "--config.learning_rate=nan": 2,
        "--config.batch_size=3": 2,  # of which 2 parts cannot be made
        "--config.init_from.model=nowhere": 1,
        "--config.model.unet.cross_attention_dim=8": 1,  # after the filters have looked at all images
        "--config.data.eval_split=nowhere": 1,
    }
    old = tmp_path / "old"
    old.mkdir()
    (old / "run.json").write_text("mine")
    for flag, code in refused.items():
        for work in (tmp_path / "runs" / "new", old):
            got, _, err = train_cli(*args, "--config.accumulate=2", flag, f"--workdir={work}")
            assert got == code, err
            assert err.count("\n") == 1
        assert not (tmp_path / "runs").exists(), flag
        assert existing(old) == ["run.json"], flag
    assert (old / "run.json").read_text() == "mine"


def test_what_was_there_stays_and_what_is_kept_too(tmp_path):
    (tmp_path / "mine").write_text("")

    def fail(name, keeps):
        with claimed(tmp_path) as keep:
            (tmp_path / name).mkdir()
            (tmp_path / name / "part").write_text("")
            if keeps:
                keep()
            raise ZeroDivisionError

    for name, keeps, left in (("data", False, ["mine"]), ("run", True, ["lock", "mine", "run/part"])):
        with pytest.raises(ZeroDivisionError):
            fail(name, keeps)
        assert existing(tmp_path) == left
    with claimed(tmp_path), pytest.raises(WorkdirError, match="in use"), claimed(tmp_path):
        pass
    assert existing(tmp_path) == ["lock", "mine", "run/part"]
    with (
        pytest.raises(WorkdirError, match=r"--workdir: .*mine/below cannot be written to"),
        claimed(tmp_path / "mine" / "below"),
    ):
        pass


def test_what_the_file_system_refuses_is_one_sentence(train_cli, tmp_path, monkeypatch):
    for error, said in ((OSError(28, "No space left on device", "x/y"), "x/y"), (OSError(28, "No space left"), "/run")):
        monkeypatch.setattr(train, "run", lambda f, error=error: (_ for _ in ()).throw(error))
        code, _, err = train_cli(f"--config={CONFIG}:vae", f"--workdir={tmp_path}/run", "--config.data.path=x")
        assert code == 1
        assert f"{said} cannot be read or written (No space left" in err
        assert "Error" not in err
