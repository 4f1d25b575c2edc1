"""A disk cache of compiled programs that are run without being traced.

JAX's own cache only saves compilation: a program must still be traced and lowered before it is looked up, which takes
longer than drawing an image with a small model, and many seconds with a large one. Here a program is found by
everything that determines it: the caller's key, the shapes and shardings of its arguments, this package's code, the
versions of JAX, the devices, the processor and JAX's settings. If a file cannot be used, the program is compiled as
usual.

The files hold machine code, like those of JAX's cache, and are trusted in the same way (docs/trust.md).
"""

import contextlib
import functools
import hashlib
import json
import os
import pickle
import platform
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from absl import logging
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import NamedSharding

from jaxdiff.files import atomic_write, write_text
from jaxdiff.io import cache
from jaxdiff.models.model import Model, param_shapes
from jaxdiff.typing import Params

PACKAGES = ("jax", "jaxlib", "flax", "numpy", "ml_dtypes")
VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
CODE = Path(__file__).parent.parent
_programs: dict[Path, Callable[..., Any]] = {}  # of this process


def lookup(key: object, program: Any, *args: Any) -> Callable[..., Any]:
    """A program of `jax.jit`, compiled for arguments like these.

    It is read from the folder of `cache_compilations`, or compiled and written there.

    Args:
        key: what determines the program besides its arguments, completely described by its `repr`. If that contains an
            object's address, nothing is cached.
        program: what `jax.jit` returns.
        args: trees of arrays.
    """
    leaves, tree = jax.tree.flatten(args)
    shardings = [getattr(x, "sharding", None) for x in leaves]
    meshes = {s.mesh: s.mesh.device_ids.tolist() for s in shardings if isinstance(s, NamedSharding)}
    places = [*map(jax.typeof, leaves), shardings, list(meshes.values())]
    fingerprint = repr((key, str(tree), places, environment()))
    folder = cache.local_folder()
    if folder is None or " at 0x" in fingerprint or jax.process_count() > 1:
        return program
    path = folder / f"program-{hashlib.sha256(fingerprint.encode()).hexdigest()[:32]}"
    if path in _programs:
        return _programs[path]
    try:
        _programs[path] = serialize_executable.deserialize_and_load(*pickle.loads(path.read_bytes()))
        return _programs[path]
    except FileNotFoundError:
        pass
    except Exception as e:  # errors of pickle and XLA: the file is damaged or from another kind of machine
        logging.warning("%s cannot be used (%s): compiled again.", path, e)
    with _without_jax_cache():
        _programs[path] = compiled = program.lower(*args).compile()
    try:
        content = pickle.dumps(serialize_executable.serialize(compiled))
        with atomic_write(path) as temporary:
            temporary.write_bytes(content)
    except Exception as e:  # a full disk, or a program that XLA cannot write
        logging.info("%s is not kept: %s", path, e)
    return compiled


@contextlib.contextmanager
def _without_jax_cache() -> Iterator[None]:
    """Disable JAX's cache: XLA's CPU programs that were read from it cannot be serialized completely."""
    setting = "jax_enable_compilation_cache"
    previous = jax.config.values[setting]
    jax.config.update(setting, False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update(setting, previous)
        compilation_cache.reset_cache()


def environment() -> tuple[Any, ...]:
    """Everything that a compiled program depends on besides its computation and arguments."""
    settings = {name: value for name, value in jax.config.values.items() if "cache" not in name}
    return _machine(), {name: os.environ.get(name) for name in VARIABLES}, sorted(settings.items(), key=str)


@functools.cache
def _code() -> tuple[Any, ...]:
    code = hashlib.sha256()
    for file in sorted(CODE.rglob("*.py")):
        code.update(file.read_bytes())
    return code.hexdigest(), *((name, version(name)) for name in PACKAGES)


@functools.cache
def _machine() -> tuple[Any, ...]:
    backend = jax.devices()[0].client
    devices = [(d.id, d.device_kind) for d in jax.devices()]
    return *_code(), backend.platform, backend.platform_version, devices, processor()


def processor() -> tuple[str, ...]:
    """The host's processor and its features: machine code for one processor may not run on another."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        lines = []
    features = {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}
    return (platform.system(), platform.machine(), platform.processor(), *sorted(features))


def shapes(model: Model) -> Params:
    """`param_shapes` of a model, cached on disk so that later processes do not trace its networks.

    Raises:
        The errors of `param_shapes` for invalid configs, which are not cached.
    """
    folder = cache.local_folder()
    if folder is None:
        return param_shapes(model)
    path = folder / f"shapes-{hashlib.sha256(repr((model, *_code())).encode()).hexdigest()[:32]}.json"
    try:
        cached = json.loads(path.read_text(encoding="utf-8"))
        return unflatten_dict({name: jax.ShapeDtypeStruct(*struct) for name, struct in cached.items()}, sep="/")
    except FileNotFoundError:
        pass
    except (OSError, ValueError, TypeError) as e:
        logging.warning("%s cannot be used (%s): written again.", path, e)
    tree = param_shapes(model)
    flat = {name: (x.shape, str(x.dtype)) for name, x in flatten_dict(tree, sep="/").items()}
    with contextlib.suppress(OSError):
        write_text(path, json.dumps(flat))
    return tree
