"""Model folders from the Hugging Face hub."""

from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from jaxdiff.config import ConfigError

# The folders of a diffusers model that are read: configs, vocabularies, weights. Everything else is left on the hub:
# single-file copies, a safety checker, ONNX copies, older autoencoders.
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
FORMATS = ("safetensors", "bin")  # the second only where the first is missing; none of its code is run
UNUSED = ["*.non_ema*", "*/*/*"]
VARIANTS = ["*.fp16*", "*.bf16*"]


def attempts(variant: str | None) -> list[tuple[list[str], list[str]]]:
    """Patterns of the files to fetch and of those to leave, each for one set of weights, in the order of preference."""
    wanted, tries = [f"*.{variant}*"] if variant else VARIANTS, []
    for suffix in FORMATS:
        if not variant:
            tries.append(([f"{f}/*.{suffix}" for f in WEIGHT_FOLDERS], UNUSED + VARIANTS))
        tries.append(([f"{f}/{w}.{suffix}" for f in WEIGHT_FOLDERS for w in wanted], UNUSED))
    return [(CONFIG_FILES + weights, unwanted) for weights, unwanted in tries]


def chosen(names: Sequence[str], variant: str | None = None) -> list[str]:
    """Of all files of a folder, by their names in it, those that are fetched: of other folders than a model's, all."""
    if "model_index.json" not in names:
        return list(names)
    for wanted, unwanted in attempts(variant):
        found = [n for n in names if _matches(n, wanted) and not _matches(n, unwanted)]
        if any(fnmatch(n, f"{f}/*.*") and not n.endswith(".json") for n in found for f in DENOISERS):
            break
    return found


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def fetch(repo_id: str, revision: str | None = None, variant: str | None = None) -> Path:
    """The folder of a hub's model, fetched if it is not yet on this machine.

    Args:
        repo_id: "owner/name".
        revision: a branch, tag or commit; the main branch by default.
        variant: "fp16" fetches the weights `*.fp16.*`; None those without such a word, or others where there are none.

    Raises:
        ConfigError: the network is missing, or the hub has no such model.
    """
    from huggingface_hub import snapshot_download  # transformers brings it

    try:
        for wanted, unwanted in attempts(variant):
            folder = Path(
                snapshot_download(repo_id, revision=revision, allow_patterns=wanted, ignore_patterns=unwanted)
            )
            if any(found.suffix != ".json" for f in DENOISERS for found in folder.glob(f"{f}/*.*")):
                break
        parts = [p.parent for p in folder.glob("*/config.json")]
        without = [p for p in parts if all(found.suffix == ".json" for found in p.glob("*.*"))]
        for part in without if variant and len(without) < len(parts) else ():  # whose weights have no such variant
            for suffix in FORMATS:
                plain = [f"{part.name}/*.{suffix}"]
                snapshot_download(repo_id, revision=revision, allow_patterns=plain, ignore_patterns=UNUSED + VARIANTS)
                if any(part.glob(f"*.{suffix}")):
                    break
        return folder
    except Exception as e:  # the package's own errors, those of its HTTP client, and of the disk
        reason = " ".join(str(e).split())[:200] or type(e).__name__
        raise ConfigError(
            f"{repo_id} is not a local folder, and it cannot be fetched from the Hugging Face hub ({reason}): "
            "check the name and the network, or give a local folder."
        ) from None
