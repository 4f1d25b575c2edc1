"""Fixtures that many tests share."""

import gc
import os
import resource
import shutil
from importlib.metadata import version
from pathlib import Path

import pytest

pytest_plugins = ("tests.support.browser", "tests.support.commands", "tests.support.store_server")

# Most of the tests' time is compilation of what then runs once or twice. Without optimisations and with XLA's older
# emitter of fused loops, where this jaxlib has both, it takes a third. `make test-all` sets the first to 0 and so tests
# what users run.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
QUICK = os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] != "0"
if QUICK:
    flags = {  # and the versions of jaxlib that have them: XLA ends the process at a flag that it does not know
        "--xla_cpu_use_fusion_emitters=false": ("0.10.", "0.11."),
        "--xla_cpu_parallel_codegen_split_count=1": ("0.10.", "0.11.", "0.12."),
    }
    known = [flag for flag, versions in flags.items() if version("jaxlib").startswith(versions)]
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *known])

# Compiled programs are kept for all workers, the programs that tests start, and the next run. Their names tell
# processors, flags and versions apart.
COMPILED = Path(__file__).parent.parent / ".pytest_cache" / "compiled"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(COMPILED))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

MEMORY = 3 << 30  # bytes of a worker, over which it lets compiled programs go
RUN_LONG = ("test_examples",)  # longer than it compiles
if "PYTEST_XDIST_WORKER" in os.environ:  # PyTorch's threads would wait in turns for cores that other workers have
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# The files that take longest, by which parallel workers begin so that they end together.
LONGEST = (
    "test_trust", "test_generate", "test_bundled", "test_finetune_cli", "test_transformers", "test_training_oracle",
    "test_distillation_oracle", "test_transformer_files", "test_models", "test_scheduler_oracle", "test_tasks",
    "test_examples_tiny", "test_mmdit", "test_training_loop", "test_lora_oracle", "test_text", "test_sharded",
)  # fmt: skip


def pytest_configure(config):
    """Start afresh where code that changed has left too many programs."""
    worker = hasattr(config, "workerinput")
    if not worker and COMPILED.is_dir() and sum(file.stat().st_size for file in COMPILED.iterdir()) > 1 << 30:
        shutil.rmtree(COMPILED)


def pytest_collection_modifyitems(items):
    names = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: names.get(item.path.stem, len(names)))


@pytest.fixture(scope="module", autouse=True)
def optimised(request):
    """All optimisations for the files that run longer than they compile."""
    import jax

    if not QUICK or request.path.stem not in RUN_LONG:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")  # of programs that a test starts
        jax.config.update("jax_disable_most_optimizations", False)
        yield
        jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """Lets the programs of earlier files go once this process is large; all of them would fill the memory."""
    yield
    statm = Path("/proc/self/statm")
    if statm.exists() and int(statm.read_text().split()[1]) * resource.getpagesize() > MEMORY:
        import jax

        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def tiny():
    """(model, params) of the tiny random model."""
    from tests.support.tiny import tiny_model, tiny_params

    model = tiny_model()
    return model, tiny_params(model)


@pytest.fixture(scope="session")
def tiny_folder(tiny, tmp_path_factory):
    """The tiny model as a diffusers folder. Not to be written to: tests that damage files copy it."""
    from jaxdiff.io.pretrained import save

    folder = tmp_path_factory.mktemp("model") / "tiny"
    save(folder, *tiny)
    return folder
