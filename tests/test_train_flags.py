"""How a config is found and read: by name, under old names of settings, with defaults from one place."""

import configparser
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from jaxdiff.cli import train_flags
from jaxdiff.cli.errors import UsageError
from jaxdiff.cli.train_flags import find_config, parse
from jaxdiff.config import ConfigError
from jaxdiff.training.defaults import RENAMED, as_json, base, flat
from jaxdiff.training.options import NoiseOptions, Options, OptionsError
from jaxdiff.training.run_data import fingerprints
from jaxdiff.training.workdir import WorkdirError, settle, stored_config
from tests.support.processes import CONFIG, ROOT
from tests.support.written import write_squares

# ml_collections loads configs by a method that Python has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


# --- defaults


def test_options_and_configs_have_the_same_defaults():
    assert Options.from_config(base()) == Options()
    assert NoiseOptions.from_config(base()) == NoiseOptions()
    assert (Options().b2, Options().schedule, Options().warmup) == (0.99, "cosine", 500)


# --- paths


def test_home_is_where_the_user_is(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    given = ["--config.data.path=~/d", "--config.init_from.vae=~/v", "--config.prior_preservation.path=a/~"]
    f = parse(["train.py", f"--config={CONFIG}:unet", "--workdir=~/w", *given])
    assert (f.workdir, f.config.data.path, f.config.init_from.vae) == (
        "/home/someone/w",
        "/home/someone/d",
        "/home/someone/v",
    )
    assert f.config.prior_preservation.path == "a/~"
    with pytest.raises(UsageError, match=r"--workdir x+… has a name of 300 bytes"):
        parse(["train.py", f"--config={CONFIG}:unet", f"--workdir={'x' * 300}", *given])


# --- old names


GROUPS_AND_SETTINGS = {old: new for old, new in RENAMED.items() if "." not in old}


@pytest.mark.parametrize(("old", "new"), GROUPS_AND_SETTINGS.items())
def test_old_names_are_accepted_with_a_warning_that_gives_the_new_one(old, new, caplog):
    config, value = base(), {"token": "<x>"} if old == "word" else {"path": "x"} if old == "prior" else "int8"
    if old == "rates":
        value = (("text_encoder", 0.1),)
    config.update({old: value})
    expected = {**base()[new], **value} if isinstance(value, dict) else value
    found = config[new].to_dict() if isinstance(value, dict) else config[new]
    assert found == expected  # fields that are not given stay
    assert old not in as_json(config)
    assert f"config.{old} is called config.{new} now" in caplog.text


def test_old_names_are_accepted_as_attributes_and_as_flags(caplog):
    config = base()
    config.word.token, config.rates = "<x>", (("unet", 0.5),)
    assert (config.textual_inversion.token, config.lr_multipliers) == ("<x>", (("unet", 0.5),))
    flags = ["--config.prior.weight=0.5", "--config.moments", "int8"]
    f = parse(["train.py", f"--config={CONFIG}:unet", "--workdir=x", "--config.data.path=y", *flags])
    assert (f.config.prior_preservation.weight, f.config.moment_dtype) == (0.5, "int8")
    assert "config.prior is called config.prior_preservation now" in caplog.text


@pytest.mark.parametrize("give", [
    lambda config: setattr(config.eval, "pictures", 3),
    lambda config: config.eval.update({"pictures": 3}),
    lambda config: config.update({"eval": {"pictures": 3}}),
    lambda config: config.__setitem__("eval", {**config.eval.to_dict(), "pictures": 3}),
    lambda config: config.__setitem__("eval", ConfigDict({**config.eval.to_dict(), "pictures": 3})),
])  # fmt: skip
def test_an_old_name_within_a_group_is_accepted_however_it_is_given(give, caplog):
    config = base()
    give(config)
    assert (config.eval.images, config.eval.pictures) == (3, 3)
    assert as_json(config)["eval"] == {**as_json(base())["eval"], "images": 3}
    assert "config.eval.pictures is called config.eval.images now" in caplog.text
    f = parse(
        ["train.py", f"--config={CONFIG}:unet", "--workdir=x", "--config.data.path=y", "--config.eval.pictures=5"]
    )
    assert f.config.eval.images == 5


def test_a_workdir_with_old_names_goes_on_and_refuses_other_values(tmp_path):
    config = base()
    config.moment_dtype, config.textual_inversion.token = "int8", "<x>"
    before = as_json(config)
    for old, new in GROUPS_AND_SETTINGS.items():
        before[old] = before.pop(new)
    before["eval"]["pictures"] = before["eval"].pop("images")
    (tmp_path / "checkpoints" / "10").mkdir(parents=True)
    (tmp_path / "run.json").write_text(json.dumps({"config": before, "data": {}, "versions": {}}))
    stored = stored_config(tmp_path)
    assert stored["textual_inversion"]["token"] == "<x>"
    assert not set(RENAMED) & set(flat(stored))
    assert stored["eval"]["images"] == config.eval.images
    changed = {**as_json(config), "moment_dtype": "bfloat16"}
    with pytest.raises(WorkdirError, match=r'moment_dtype: "int8" -> "bfloat16"\): go on'):
        settle(tmp_path, changed, {}, as_json(base()))
    settle(tmp_path, as_json(config), {}, as_json(base()))
    assert json.loads((tmp_path / "run.json").read_text())["config"]["moment_dtype"] == "int8"


# --- configs by name


def test_a_config_is_found_by_its_name(tmp_path, monkeypatch):
    assert Path(find_config("lora")).samefile(ROOT / "configs" / "finetune" / "lora.py")
    assert find_config("icons/unet:cpu").endswith("configs/icons/unet.py:cpu")
    assert find_config("configs/icons/unet.py:cpu") == "configs/icons/unet.py:cpu"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lora").mkdir()  # such as a workdir
    assert Path(find_config("lora")).samefile(ROOT / "configs" / "finetune" / "lora.py")
    (tmp_path / "configs" / "mine").mkdir(parents=True)
    (tmp_path / "configs" / "mine" / "lora.py").touch()
    assert find_config("lora") == "configs/mine/lora.py"
    (tmp_path / "configs" / "lora.py").touch()
    with pytest.raises(UsageError, match=r"may be any of configs/lora\.py, configs/mine/lora\.py: give its path"):
        find_config("lora")


def test_a_config_of_no_such_name_is_refused_with_those_that_there_are():
    with pytest.raises(UsageError, match=r"--config=lorra is neither a file nor .* known are .*\blora\b"):
        parse(["train.py", "--config", "lorra"])


def test_an_installed_package_has_the_command_and_the_fine_tuning_configs(tmp_path, monkeypatch):
    pytest.importorskip("setuptools")
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    commands = dict(line.split(" = ") for line in setup["options.entry_points"]["console_scripts"].strip().splitlines())
    module, function = commands["jaxdiff-train"].split(":")
    assert callable(getattr(importlib.import_module(module), function))
    # Without the bundled model's weights.
    code = "import runpy, setuptools.command.build_py as b; b.build_py.build_package_data = lambda self: None; "
    code += "runpy.run_path('setup.py', run_name='__main__')"
    command = [sys.executable, "-W", "ignore", "-c", code, "-q", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)
    installed = tmp_path / "jaxdiff" / "configs"
    monkeypatch.setattr(train_flags, "CONFIG_FOLDERS", (installed,))
    f = parse(["train.py", "--config=lora", "--workdir=x", "--config.data.path=y"])
    assert (f.config.stage, f.config.learning_rate) == ("lora", 1e-4)


# --- data that are not there


def test_images_without_captions_name_the_setting_that_gives_them(tmp_path):
    for name in ("data", "class"):
        (tmp_path / name).mkdir()
    data = write_squares(tmp_path / "data")
    (tmp_path / "class" / "0.png").write_bytes((data / "0.png").read_bytes())
    config = base()
    config.data.path, config.prior_preservation.path = str(data), str(tmp_path / "class")
    with pytest.raises(OptionsError, match=r"^prior_preservation\.captions is missing: .*class have no metadata"):
        fingerprints(config)
    config.prior_preservation.captions = ("a square",)
    assert fingerprints(config)["prior"]["files"] == 1
    config.data.path, config.prior_preservation.path = str(tmp_path / "class"), ""
    with pytest.raises(OptionsError, match=r"^data\.captions is missing"):
        fingerprints(config)


def test_the_icons_set_that_is_not_there_names_what_builds_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = base()
    config.data.path = "data/icons"
    with pytest.raises(ConfigError, match=r"does not exist\. `python -m .*icons.*10 minutes.*npm and apt.*300 MB"):
        fingerprints(config)
    config.data.path = "data/others"
    with pytest.raises(ConfigError, match=r"does not exist\.$"):
        fingerprints(config)


def test_an_earlier_average_stays_unless_it_is_to_be_replaced(train_cli, tmp_path):
    export = tmp_path / "export-ema-0.1"
    export.mkdir()
    (export / "file").touch()
    code, _, err = train_cli(f"--workdir={tmp_path}", "--posthoc_ema=0.1")
    assert code == 2
    assert f"--posthoc_ema=0.1: {export} exists: move it, or give --overwrite" in err
    code, _, err = train_cli(f"--workdir={tmp_path}", "--posthoc_ema=0.1", "--overwrite")
    assert "run.json cannot be read" in err  # past it
    code, _, err = train_cli(f"--workdir={tmp_path}", "--config=lora", "--overwrite")
    assert code == 2
    assert "--overwrite goes with --posthoc_ema" in err
    assert [p.name for p in export.iterdir()] == ["file"]
