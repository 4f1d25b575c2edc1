"""Model folders from the Hugging Face hub, where the package `huggingface_hub` and the network are there."""

from pathlib import Path

from jaxdiff.config import ConfigError

# A diffusers folder's configs, vocabularies and weights without code in them; not the one-file copies beside it.
PATTERNS = ["model_index.json", "*/*.json", "*/*.txt", "*/*.safetensors"]
UNUSED = ["safety_checker/*", "*.non_ema.*"]
VARIANTS = ["*.fp16.*", "*.bf16.*"]  # fetched only where there is nothing else


def fetch(repo_id: str, revision: str | None = None) -> Path:
    """The folder of a hub's model, fetched if it is not yet on this machine.

    Args:
        repo_id: "owner/name".
        revision: a branch, tag or commit; the main branch by default.

    Raises:
        ConfigError: the package or the network is missing, or the hub has no such model.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ConfigError(
            f"{repo_id} is no folder here, and fetching it needs a package: pip install huggingface_hub."
        ) from None
    try:
        for unwanted in (UNUSED + VARIANTS, UNUSED):
            folder = Path(
                snapshot_download(repo_id, revision=revision, allow_patterns=PATTERNS, ignore_patterns=unwanted)
            )
            if any(folder.glob("unet/*.safetensors")):
                break
        return folder
    except Exception as e:  # the package's own errors, those of its HTTP client, and of the disk
        reason = " ".join(str(e).split())[:200] or type(e).__name__
        raise ConfigError(
            f"{repo_id} is no folder here, and it cannot be fetched from the Hugging Face hub ({reason}): "
            "check the name and the network, or give a local folder."
        ) from None
