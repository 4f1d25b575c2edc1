"""Downloading model folders from the Hugging Face hub."""

from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from jaxdiff.config import ConfigError

# The folders of a diffusers model that are downloaded: configs, vocabularies, weights. Everything else is skipped, such
# as single-file and ONNX copies, safety checkers and older autoencoders.
DENOISERS = ["unet", "transformer"]
WEIGHT_FOLDERS = [
    *DENOISERS, "vae", "text_encoder", "text_encoder_2", "text_encoder_3", "vision_encoder", "controlnet",
    "controlnet_?",
]  # fmt: skip
OTHER_FOLDERS = ["scheduler", "low_res_scheduler", "tokenizer", "tokenizer_2", "tokenizer_3"]
CONFIG_FILES = [
    "model_index.json",
    *(f"{f}/*.json" for f in WEIGHT_FOLDERS + OTHER_FOLDERS),
    *(f"{f}/*.{suffix}" for f in OTHER_FOLDERS for suffix in ("txt", "model", "jinja")),
]
FORMATS = ("safetensors", "bin")  # in order of preference; no code in pickles is run
UNUSED = ["*.non_ema*", "*/*/*"]
VARIANTS = ["*.fp16*", "*.bf16*"]


def weight_patterns(variant: str | None) -> list[tuple[list[str], list[str]]]:
    """Patterns of files to allow and to ignore, for each set of weights in order of preference."""
    variants, patterns = [f"*.{variant}*"] if variant else VARIANTS, []
    for suffix in FORMATS:
        if not variant:
            patterns.append(([f"{f}/*.{suffix}" for f in WEIGHT_FOLDERS], UNUSED + VARIANTS))
        patterns.append(([f"{f}/{w}.{suffix}" for f in WEIGHT_FOLDERS for w in variants], UNUSED))
    return [(CONFIG_FILES + allowed, ignored) for allowed, ignored in patterns]


def chosen(names: Sequence[str], variant: str | None = None) -> list[str]:
    """The files of a folder to fetch, by their names in it; all of them if it is not a model's folder."""
    if "model_index.json" not in names:
        return list(names)
    for allowed, ignored in weight_patterns(variant):
        selected = [n for n in names if _matches(n, allowed) and not _matches(n, ignored)]
        if any(fnmatch(n, f"{f}/*.*") and not n.endswith(".json") for n in selected for f in DENOISERS):
            break
    return selected


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def fetch(repo_id: str, revision: str | None = None, variant: str | None = None) -> Path:
    """The local folder of a model on the hub, downloaded if necessary.

    Args:
        repo_id: "owner/name".
        revision: a branch, tag or commit; the main branch by default.
        variant: "fp16" fetches the weights `*.fp16.*`; None those without a variant, or any if all have one.

    Raises:
        ConfigError: the network is missing, or the hub has no such model.
    """
    from huggingface_hub import snapshot_download  # transformers brings it

    try:
        for allowed, ignored in weight_patterns(variant):
            folder = Path(
                snapshot_download(repo_id, revision=revision, allow_patterns=allowed, ignore_patterns=ignored)
            )
            if any(file.suffix != ".json" for f in DENOISERS for file in folder.glob(f"{f}/*.*")):
                break
        parts = [p.parent for p in folder.glob("*/config.json")]
        missing = [p for p in parts if all(file.suffix == ".json" for file in p.glob("*.*"))]
        for part in missing if variant and len(missing) < len(parts) else ():  # parts without this variant
            for suffix in FORMATS:
                pattern = [f"{part.name}/*.{suffix}"]
                snapshot_download(repo_id, revision=revision, allow_patterns=pattern, ignore_patterns=UNUSED + VARIANTS)
                if any(part.glob(f"*.{suffix}")):
                    break
        return folder
    except Exception as e:  # the package's own errors, those of its HTTP client, and of the disk
        reason = " ".join(str(e).split())[:200] or type(e).__name__
        raise ConfigError(
            f"{repo_id} is not a local folder, and it cannot be fetched from the Hugging Face hub ({reason}): "
            "check the name and the network, or give a local folder."
        ) from None
