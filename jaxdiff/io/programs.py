"""Programs that an earlier process compiled, kept on disk and run without being traced.

JAX's own cache spares compiling. But a program must be traced and lowered before it is looked up there, which takes
longer than an image of a small model, and many seconds for a large one. Here a program is found by what decides it: the
caller's key, the shapes and places of its arguments, this package's code, the versions of JAX, the devices, the
processor and JAX's settings. Whatever goes wrong with a file, the program is compiled as ever.

A file holds machine code, as those of JAX's cache do: the folder is as trusted as they are (docs/trust.md).
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
    """A program of `jax.jit`, compiled for these arguments and those like them.

    It is read from the folder that `cache_compilations` opened, or compiled and written there.

    Args:
        key: what decides the program beside its arguments; its `repr` says it all. Where that holds an object's
            address, which another process would have elsewhere, nothing is kept.
        program: what `jax.jit` returns.
        args: arrays in trees.
    """
    leaves, tree = jax.tree.flatten(args)
    shardings = [getattr(x, "sharding", None) for x in leaves]
    meshes = {s.mesh: s.mesh.device_ids.tolist() for s in shardings if isinstance(s, NamedSharding)}
    places = [*map(jax.typeof, leaves), shardings, list(meshes.values())]
    decided = repr((key, str(tree), places, surroundings()))
    folder = cache.kept()
    if folder is None or " at 0x" in decided or jax.process_count() > 1:
        return program
    path = folder / f"program-{hashlib.sha256(decided.encode()).hexdigest()[:32]}"
    if path in _programs:
        return _programs[path]
    try:
        _programs[path] = serialize_executable.deserialize_and_load(*pickle.loads(path.read_bytes()))
        return _programs[path]
    except FileNotFoundError:
        pass
    except Exception as e:  # of pickle, of XLA: a file that is damaged or of a machine that the name does not tell
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
    """XLA's programs for CPUs that were read from there cannot be written again: parts of them would be missing."""
    name = "jax_enable_compilation_cache"
    before = jax.config.values[name]
    jax.config.update(name, False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update(name, before)
        compilation_cache.reset_cache()


def surroundings() -> tuple[Any, ...]:
    """All that a compiled program depends on beside what it computes and its arguments."""
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
    """What the host's processor is and can do: machine code for one may not run on another."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        lines = []
    known = {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}
    return (platform.system(), platform.machine(), platform.processor(), *sorted(known))


def shapes(model: Model) -> Params:
    """`param_shapes` of a model, without tracing its networks where an earlier process has kept what it found.

    Raises:
        What `param_shapes` raises, of configs that do not make a network; such are never kept.
    """
    folder = cache.kept()
    if folder is None:
        return param_shapes(model)
    path = folder / f"shapes-{hashlib.sha256(repr((model, *_code())).encode()).hexdigest()[:32]}.json"
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        return unflatten_dict({name: jax.ShapeDtypeStruct(*found) for name, found in kept.items()}, sep="/")
    except FileNotFoundError:
        pass
    except (OSError, ValueError, TypeError) as e:
        logging.warning("%s cannot be used (%s): written again.", path, e)
    found = param_shapes(model)
    flat = {name: (x.shape, str(x.dtype)) for name, x in flatten_dict(found, sep="/").items()}
    with contextlib.suppress(OSError):
        write_text(path, json.dumps(flat))
    return found
