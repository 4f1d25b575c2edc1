"""What runs a documented command or Python block: small stand-ins for what a user has, few steps, and no network."""

import configparser
import dataclasses
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from absl import flags
from PIL import Image

import jaxdiff
from configs.icons import sizes
from jaxdiff.cli import flags as sample_flags
from jaxdiff.cli import options, sample, serve_options, train, train_flags
from jaxdiff.config.upscaler import RRDBConfig
from jaxdiff.evaluation import command as evaluation
from jaxdiff.evaluation import flags as evaluation_flags
from jaxdiff.io import model_paths
from jaxdiff.io.images import write_png
from jaxdiff.io.lora import init_lora, save_lora
from jaxdiff.io.modules import save_module
from jaxdiff.io.textual_inversion import extend, save_textual_inversion
from jaxdiff.io.upscaler import save_upscaler
from jaxdiff.models.model import Model, build
from jaxdiff.models.rrdb import RRDBNet, param_shapes
from jaxdiff.training.defaults import base
from tests.support import evaluation_folders, image_datasets, tiny
from tests.support.documents import ROOT, program, read
from tests.support.training_config import TEXT

# Few steps on small images; flags given last win. One image at a time, so that all commands share a compiled program.
FEW_STEPS = ["--steps=2"]
ONE_BY_ONE = ["--batch_size=1"]
FEW_UPDATES = [
    "--config.steps=2", "--config.batch_size=4", "--config.accumulate=1", "--config.warmup_steps=0",
    "--config.log_every=1", "--config.eval_every=0", "--config.dtype=float32", "--config.remat=",
    "--config.data.image_size=16", "--config.data.threads=1", "--config.eval.steps=2", "--config.eval.images=2",
    "--config.tokenizer.vocab_size=560", "--config.latents.batch_size=4",
]  # fmt: skip
SHORT_TRAINING = [
    "--steps", "2", "--batch_size", "2", "--held_out", "2", "--dtype", "float32", "--optimizer", "adamw",
    "--prompts", "a castle",
]  # fmt: skip
SMALLER = {"image_size=128": "image_size=16", "Options(steps=1000": "Options(steps=2", "steps=25": "steps=3"}

# --- stand-ins for what a user has


def sdxl() -> Model:
    """A tiny model of SDXL's shape."""
    conditions = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    sizes = {"cross_attention_dim": 32, "projection_class_embeddings_input_dim": 6 * 8 + 16}
    unet = dataclasses.replace(tiny.UNET, use_linear_projection=True, **conditions, **sizes)
    second = dataclasses.replace(tiny.text_config(), with_projection=True)
    tokens = tiny.tokenizer()
    return build(tiny.text_config(), unet, tiny.VAE, tokens, tiny.SCHEDULER, text_2=second, tokenizer_2=tokens)


def save(path: Path, model: Model) -> None:
    jaxdiff.save(path, model, tiny.tiny_params(model))


def lora(path: Path, model: Model) -> None:
    save_lora(path, model, init_lora(model, tiny.tiny_params(model), 2, key=jax.random.key(0)))


def textual_inversion(path: Path) -> None:
    model = tiny.tiny_model()
    params = tiny.tiny_params(model)
    model, encoder = extend(model, params["text_encoder"], "text_encoder", "<new>", np.ones((1, 16), np.float32))
    save_textual_inversion(path, model, params | {"text_encoder": encoder}, "<new>")


def vae(path: Path) -> None:
    """An autoencoder's file, which its config lies beside."""
    model, folder = tiny.tiny_model(), path.with_suffix("")
    save_module(folder, model.vae, tiny.tiny_params(model)["vae"])
    (folder / "diffusion_pytorch_model.safetensors").rename(path)
    (folder / "config.json").rename(path.with_name("config.json"))
    folder.rmdir()


def image(path: Path) -> None:
    write_png(path, np.zeros((tiny.SIDE, tiny.SIDE, 3), np.uint8), {"prompt": "a castle"})


def without_captions(folder: Path) -> None:
    for split in ("train", "validation"):
        (folder / split).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (16, 16), (50 * i, 0, 99)).save(folder / split / f"{i}.png")


def photographs(folder: Path) -> None:
    folder.mkdir()
    for i in range(2):
        Image.new("RGB", (16, 16), (90 * i, 50, 99)).save(folder / f"{i}.jpg")


def upscaler(path: Path) -> None:
    """A tiny upscaling network, as safetensors whatever its name."""
    module = RRDBNet(RRDBConfig(num_block=1, num_feat=4, num_grow_ch=4))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_upscaler(path, jax.tree.map(lambda x: np.zeros(x.shape, np.float32), param_shapes(module)))


def icons_set(folder: Path) -> None:
    """Laid out as datasets.icons writes it."""
    for split in ("train", "heldout_pairs", "heldout_subjects"):
        (folder / split).mkdir(parents=True)
        lines = []
        for i in range(8):
            Image.new("RGBA", (16, 16), (30 * i, 99, 0, 200)).save(folder / split / f"{i}.png")
            line = {"file_name": f"{i}.png", "text": ["a castle", f"a blue house {i}"], "subject": "castle"}
            lines.append(json.dumps(line | {"source": "noto", "style": "cartoon emoji"}))
        (folder / split / "metadata.jsonl").write_text("\n".join(lines))


STAND_INS: dict[str, Callable[[Path], object]] = {
    "my-sd15": lambda path: save(path, tiny.tiny_model()),
    "my-sdxl": lambda path: save(path, sdxl()),
    "sdxl.safetensors": lambda path: save(path, sdxl()),
    "runs/mine/export": lambda path: save(path, tiny.tiny_model()),
    "style.safetensors": lambda path: lora(path, tiny.tiny_model()),
    "sdxl-style.safetensors": lambda path: lora(path, sdxl()),
    "token.safetensors": textual_inversion,
    "vae.safetensors": vae,
    "castle.png": image,
    "small.png": image,
    "photographs": photographs,
    "RealESRGAN_x4plus.pth": upscaler,
    "runs/x4/export": lambda path: upscaler(path / "upscaler.safetensors"),
    "my-images": lambda path: evaluation_folders.data_folder(path, train=24, held_out=24),
    "elephant": without_captions,
    "shards": lambda path: image_datasets.write_tars(path, 8),
    "data/icons": icons_set,
    "clip-vit-large-patch14": evaluation_folders.clip_model_folder,
    "prompts.txt": lambda path: path.write_text("a castle\na red dragon\na blue house\na house\na dragon\nblue\n"),
}


def furnish(folder: Path, text: str) -> None:
    """Put what a block names into the folder, as far as nothing before has made it."""
    text += " data/icons" * ("configs/upscaler/" in text)  # which that config names
    for name, make in STAND_INS.items():
        path = folder / name
        if re.search(rf"(?<![\w/-]){re.escape(name)}(?![\w-])", text) and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            make(path)


def small_world(folder: Path, bundled: Path, monkeypatch) -> Path:
    """An empty folder to run in, with configs/; the models in `bundled` take the place of those that ship, and the
    stages of the icons are tiny."""
    (folder / "configs").symlink_to(ROOT / "configs")
    monkeypatch.setattr(model_paths, "BUNDLED", bundled)
    vision = TEXT | {"image_size": tiny.SIDE, "patch_size": 8, "projection_dim": 16}
    monkeypatch.setattr(sizes, "clip", lambda: {"text_encoder": TEXT, "vision_encoder": vision})
    monkeypatch.setattr(sizes, "vae", lambda: {"vae": dataclasses.asdict(tiny.VAE)})
    monkeypatch.setattr(sizes, "unet", lambda: {"unet": dataclasses.asdict(tiny.UNET)})
    monkeypatch.chdir(folder)
    return folder


# --- commands that are run


def run_sample(arguments: list[str]) -> int:
    sides = [f"--{name}={tiny.SIDE}" for name in ("height", "width") if f"--{name}" in arguments]
    draws = any(a.startswith(("--prompt", "--from_png")) for a in arguments)  # else it enlarges
    few = [] if any("runs/gan" in a for a in arguments) else FEW_STEPS  # which a GAN refuses
    return sample.main(["sample.py", *arguments, *(few + ONE_BY_ONE if draws else []), *sides])


def trains(words: list[str]) -> bool:
    """Whether a command trains, or writes latents to train on."""
    name, arguments = program(words)
    planned = any(a.startswith("--plan") for a in arguments)
    return name in ("train.py", "jaxdiff-train") and any(a.startswith("--config=") for a in arguments) and not planned


def run_train(arguments: list[str]) -> int:
    crops = ("vae.py", "upscaler/x4.py")
    more = ["--config.crop=16"] if any(name in a for name in crops for a in arguments) else []
    small = ["--config.generator.features=4", "--config.adversary.features=4", "--config.generator.layers=1"]
    more += small if any("gan.py" in a for a in arguments) else []
    more += ["--config.stage=lcm"] if any("few_steps.py" in a for a in arguments) else []  # the stand-in predicts noise
    sys.argv = ["train.py", *arguments, *(FEW_UPDATES + more if trains(["train.py", *arguments]) else [])]
    return train.main(sys.argv)


def run_evaluation(arguments: list[str]) -> int:
    return evaluation.main(["evaluation", *arguments, *FEW_STEPS])


def run_train_by_time(arguments: list[str]) -> int:
    from benchmarks import train_by_time

    for i, given in enumerate(arguments):
        if Path(given).name.startswith("latents-"):  # whose name depends on the data
            arguments[i] = str(*Path(given).parent.glob("latents-*"))
    train_by_time.main([*arguments, *(SHORT_TRAINING if arguments[0] == "train" else [])])
    return 0


RUN: dict[str, Callable[[list[str]], int]] = {
    "sample.py": run_sample,
    "train.py": run_train,
    "jaxdiff.evaluation": run_evaluation,
    "benchmarks.train_by_time": run_train_by_time,
}
RUN |= {"jaxdiff-sample": run_sample, "jaxdiff-train": run_train}

# Commands that are only checked to be possible, and why.
NOT_RUN = {
    "jaxdiff-serve": "serves until it is stopped",
    "venv": "makes the environment that this test runs in",
    "pip": "needs the network",
    "make": "runs this test",
    "datasets.icons": "needs the network, npm and apt",
    "benchmarks.compare_few_steps": "draws with models that several trainings have made",
    "benchmarks.tpu_compile": "takes a quarter of an hour and more, and the compiler for TPUs",
    "gcloud": "needs an account of Google Cloud",
    "xpk": "needs an account of Google Cloud",
}

# --- what is checked of every command without running it


def check(name: str, arguments: list[str]) -> None:
    """That a program, its flags and the settings that it names exist, and that its flags can be parsed."""
    if not arguments and name in RUN:  # the program alone
        return
    if name in ("sample.py", "jaxdiff-sample"):
        sample_flags.parse([name, *arguments])
    elif name in ("train.py", "jaxdiff-train"):
        train_flags.parse([name, *arguments])
    elif name in ("jaxdiff-serve", "jaxdiff.cli.serve"):
        serve_options.parse(["jaxdiff-serve", *arguments])
    elif name == "jaxdiff.evaluation":
        evaluation_flags.parse([name, *arguments])
    elif name == "venv":
        assert len(arguments) == 1
    elif name == "pytest":
        assert all((ROOT / file).is_file() for file in arguments)
    elif name == "pip":
        check_requirements([a for a in arguments if not a.startswith(("-", "http", "install"))])
    elif name in ("gcloud", "xpk"):
        assert arguments
    elif name == "make":
        for target in arguments:
            assert re.search(rf"^{target}:", read("Makefile"), re.MULTILINE), target
    else:
        check_script(name, arguments)


def check_requirements(names: list[str]) -> None:
    """That extras exist, and that other packages are among those that an extra asks for."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    extras = setup["options.extras_require"]
    known = {re.split(r"[<>=\[]", line)[0] for extra in extras.values() for line in extra.split("\n")}
    for name in names:
        if match := re.fullmatch(r"\.(?:\[([\w,]+)\])?", name):
            assert set(match[1].split(",") if match[1] else []) <= set(extras), name
        else:
            assert re.split(r"[<>=\[]", name)[0] in known, name


def check_script(name: str, arguments: list[str]) -> None:
    """That a module, or a script at a path, exists and defines these flags."""
    path = ROOT / (name if name.endswith(".py") else f"{name.replace('.', '/')}.py")
    path = path if path.is_file() else path.with_suffix("") / "__main__.py"
    known = defined_flags(path.read_text(encoding="utf-8"))
    for given in re.findall(r"(?:^| )--([\w.]+)", " ".join(arguments)):
        assert given in known, f"{name} has no flag --{given}"


def defined_flags(source: str) -> set[str]:
    """Flags of argparse and absl that a source defines with their names written out."""
    found = {a or b for a, b in re.findall(r'"--(\w+)"|DEFINE_\w+\(\s*"(\w+)"', source)}
    return found | (set(re.findall(r'"(\w+)": ', source)) if 'f"--{name}"' in source else set())


def known_flags() -> set[str]:
    """The flags of every command, and the settings of a training run as flags."""
    found = set(options.define()) | set(evaluation_flags.define()) | set(serve_options.ALL)
    found |= defined_flags(read("jaxdiff/cli/train_flags.py"))
    for script in (*ROOT.glob("benchmarks/*.py"), ROOT / "datasets/icons/__main__.py"):
        found |= defined_flags(script.read_text(encoding="utf-8"))
    found |= {f"no{name}" for name in options.define() if isinstance(options.define()[name], flags.BooleanFlag)}

    def settings(config, prefix: str) -> set[str]:
        names = set()
        for name, value in config.items():
            names.add(f"{prefix}.{name}")
            if hasattr(value, "items"):
                names |= settings(value, f"{prefix}.{name}")
        return names

    return found | settings(base(), "config") | {"config"}
