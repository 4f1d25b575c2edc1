"""The cache of compiled programs on disk, so that a second run with the same shapes starts at once."""

from pathlib import Path

import jax
from absl import logging

from jaxdiff import stores
from jaxdiff.files import make_writable
from jaxdiff.stores import cache_folder

MIN_SECONDS = 0.5  # programs that compile faster are not cached
_folder: Path | None = None


def cache_compilations(folder: str | Path | None = None) -> str | Path | None:
    """Make JAX cache compiled programs in a folder, for this process and later ones.

    Args:
        folder: created if missing; or a store's path, which JAX reads and writes itself. None takes JAX's current
            setting, else `cache_folder()`.

    Returns:
        The folder in use; None, with a warning, if it cannot be written: then every run compiles again.
    """
    configured = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    target = folder or configured or cache_folder()
    path = str(target) if stores.is_store(target) else Path(target)
    try:
        stores.check(path)
        if isinstance(path, str):
            stores.probe(path)
            jax.config.update(
                "jax_persistent_cache_enable_xla_caches", "none"
            )  # XLA's own caches do not support stores
        else:
            make_writable(path)
    except (OSError, stores.StoreError) as e:
        reason = e.strerror if isinstance(e, OSError) and e.strerror else e
        logging.warning("%s cannot be written (%s): every run compiles again; name another --cache_dir.", path, reason)
        return None
    global _folder
    _folder = None if isinstance(path, str) or (configured and not folder) else path
    jax.config.update("jax_compilation_cache_dir", str(path))
    min_seconds = jax.config.jax_persistent_cache_min_compile_time_secs  # type: ignore[attr-defined]
    jax.config.update("jax_persistent_cache_min_compile_time_secs", min(min_seconds, MIN_SECONDS))
    return path


def local_folder() -> Path | None:
    """The local folder of `cache_compilations`, for other start-up caches; None if unset, a store's or JAX's own."""
    return _folder
