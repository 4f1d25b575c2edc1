"""Compiled programs, kept on disk so that a second run of the same shapes starts at once."""

from pathlib import Path

import jax
from absl import logging

from jaxdiff import stores
from jaxdiff.files import make_writable
from jaxdiff.stores import cache_folder

MIN_SECONDS = 0.5  # what compiles faster is not worth a file
_kept: Path | None = None


def cache_compilations(folder: str | Path | None = None) -> str | Path | None:
    """Let JAX keep its compiled programs in a folder, of this process and later ones.

    Args:
        folder: made if missing, or a store's path, which JAX reads and writes itself; None takes the one that JAX is
            set to already, else `cache_folder()`.

    Returns:
        The folder in use; None, with a warning, where it cannot be written: then every run compiles again.
    """
    already = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    given = folder or already or cache_folder()
    path = str(given) if stores.is_store(given) else Path(given)
    try:
        stores.check(path)
        if isinstance(path, str):
            stores.probe(path)
            jax.config.update("jax_persistent_cache_enable_xla_caches", "none")  # XLA's own know no stores
        else:
            make_writable(path)
    except (OSError, stores.StoreError) as e:
        reason = e.strerror if isinstance(e, OSError) and e.strerror else e
        logging.warning("%s cannot be written (%s): every run compiles again; name another --cache_dir.", path, reason)
        return None
    global _kept
    _kept = None if isinstance(path, str) or (already and not folder) else path
    jax.config.update("jax_compilation_cache_dir", str(path))
    least = jax.config.jax_persistent_cache_min_compile_time_secs  # type: ignore[attr-defined]
    jax.config.update("jax_persistent_cache_min_compile_time_secs", min(least, MIN_SECONDS))
    return path


def kept() -> Path | None:
    """The folder of `cache_compilations`, for what else saves start-up; None before, or if a store's or JAX's own."""
    return _kept
