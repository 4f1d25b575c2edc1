"""Compiled programs, kept on disk so that a second run of the same shapes starts at once."""

import os
from pathlib import Path

import jax
from absl import logging

from jaxdiff.files import make_writable

MIN_SECONDS = 0.5  # what compiles faster is not worth a file
_kept: Path | None = None


def cache_folder() -> Path:
    """`jaxdiff` in the user's cache folder: $XDG_CACHE_HOME, else ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "jaxdiff"


def cache_compilations(folder: str | Path | None = None) -> Path | None:
    """Let JAX keep its compiled programs in a folder, of this process and later ones.

    Args:
        folder: made if missing; None takes the one that JAX is set to already, else `cache_folder()`.

    Returns:
        The folder in use; None, with a warning, where it cannot be written: then every run compiles again.
    """
    already = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    path = Path(folder or already or cache_folder())
    try:
        make_writable(path)
    except OSError as e:
        logging.warning(
            "%s cannot be written (%s): every run compiles again; name another --cache_dir.", path, e.strerror or e
        )
        return None
    global _kept
    _kept = path if folder or not already else None
    jax.config.update("jax_compilation_cache_dir", str(path))
    least = jax.config.jax_persistent_cache_min_compile_time_secs  # type: ignore[attr-defined]
    jax.config.update("jax_persistent_cache_min_compile_time_secs", min(least, MIN_SECONDS))
    return path


def kept() -> Path | None:
    """The folder of `cache_compilations`, for what else saves start-up; None before, and where it is JAX's own."""
    return _kept
