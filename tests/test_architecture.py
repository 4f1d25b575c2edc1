"""Imports point one way, from what a user calls down to the mathematics and the configs."""

import ast
import builtins
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Each house may import those after it; files of one house may import each other.
HOUSES = (
    ("sample", "train", "configs", "datasets"),
    ("jaxdiff.cli", "jaxdiff.evaluation"),
    ("jaxdiff.serving",),
    ("jaxdiff",),  # the package itself only re-exports
    ("jaxdiff.training",),
    ("jaxdiff.io",),
    ("jaxdiff.data",),
    ("jaxdiff.sampling",),
    ("jaxdiff.mapping",),
    ("jaxdiff.parallel",),
    ("jaxdiff.diffusion",),
    ("jaxdiff.models",),
    ("jaxdiff.text",),
    ("jaxdiff.config",),
    ("jaxdiff.errors", "jaxdiff.stores", "jaxdiff.files", "jaxdiff.typing", "jaxdiff.version"),
)
FOLDERS = ("jaxdiff", "configs", "datasets")
ORACLES = ("torch", "diffusers", "tensorflow")  # of tests alone
LAZY = ("transformers", "tokenizers", "scipy", *ORACLES)  # never on `import jaxdiff`


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {
    module_name(p): p
    for p in (*(p for folder in FOLDERS for p in ROOT.glob(f"{folder}/**/*.py")), ROOT / "sample.py", ROOT / "train.py")
    if p.exists()
}


def house(module: str) -> int:
    """Index of the house that a module of this repository lives in."""
    matches = [
        (len(name), i) for i, names in enumerate(HOUSES) for name in names if f"{module}.".startswith(f"{name}.")
    ]
    return max(matches)[1]


def imports(source: str) -> Iterator[tuple[str, bool]]:
    """What a source imports, by its full name, and whether only when a function runs."""

    def walk(node: ast.AST, lazy: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, lazy) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, "imports are absolute"
                yield from ((f"{child.module}.{alias.name}", lazy) for alias in child.names)
            yield from walk(child, lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))

    return walk(ast.parse(source), False)


def wrong_imports(module: str, source: str) -> list[str]:
    """What a module imports against the rules, as sentences."""
    wrong = []
    for name, lazy in imports(source):
        top = name.split(".")[0]
        ours = top in ("jaxdiff", "configs", "datasets", "sample", "train")
        if ours and house(name) < house(module) and module != "jaxdiff":
            wrong.append(f"{module} imports {name}, which is above it")
        if name.startswith("flax.linen") and house(module) != house("jaxdiff.models"):
            wrong.append(f"{module} imports {name}, which only jaxdiff.models may")
        if top == "flax" and house(module) == house("jaxdiff.diffusion"):
            wrong.append(f"{module} imports {name}: the mathematics knows no Flax")
        if top in ORACLES:
            wrong.append(f"{module} imports {name}, which only tests may")
        if top in LAZY and not lazy:
            wrong.append(f"{module} imports {name} at once, not when it is needed")
    return wrong


def circle(sources: dict[str, str]) -> list[str]:
    """Modules that import each other in a circle, lazily or not, the first one also last; empty where none do."""

    def imported(module: str) -> set[str]:
        names = {name for name, _ in imports(sources[module])}
        return {n if n in sources else n.rpartition(".")[0] for n in names} & set(sources)

    try:
        graphlib.TopologicalSorter({module: imported(module) for module in sources}).prepare()
    except graphlib.CycleError as e:
        return e.args[1]
    return []


@pytest.mark.parametrize("module", sorted(FILES))
def test_imports_point_down(module):
    assert wrong_imports(module, FILES[module].read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("jaxdiff.diffusion.times", "from jaxdiff.io import images"),
        ("jaxdiff.diffusion.times", "def f():\n    import jaxdiff.sampling.generate"),
        ("jaxdiff.models.unet", "from jaxdiff import denoiser"),
        ("jaxdiff.io.images", "from jaxdiff.training.train_step import TrainState"),
        ("jaxdiff.sampling.generate", "from jaxdiff.evaluation import variety"),
        ("jaxdiff.sampling.resolve", "from jaxdiff.io import images"),
        ("jaxdiff.diffusion.times", "import flax"),
        ("jaxdiff.sampling.generate", "from flax import linen as nn"),
        ("jaxdiff.training.train_step", "import flax.linen"),
        ("jaxdiff.text.tokenizer", "from transformers import CLIPTokenizer"),
        ("jaxdiff.data.folder", "from datasets.icons import splits"),
        ("jaxdiff.io.torch_names", "def f():\n    import torch"),
    ],
)
def test_the_rules_are_noticed(module, source):
    assert wrong_imports(module, source)


def test_no_files_import_each_other_in_a_circle():
    assert circle({module: path.read_text(encoding="utf-8") for module, path in FILES.items()}) == []


def test_a_circle_is_noticed():
    a, b, c = (f"jaxdiff.models.{name}" for name in "abc")
    sources = {a: f"import {b}", b: f"def f():\n    from {c} import x", c: "import jax"}
    assert circle(sources) == []
    assert set(circle({**sources, c: "from jaxdiff.models import a"})) == {a, b, c}
    assert circle({"jaxdiff.text": f"from {a} import x", a: "from jaxdiff.text import x"})  # through a package itself


def test_every_error_is_one_of_ours():
    """Whoever catches JaxdiffError catches every error class that the package defines."""
    classes = {
        node.name: {base.id for base in node.bases if isinstance(base, ast.Name)}
        for path in ROOT.glob("jaxdiff/**/*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
    }
    builtin = {name for name, kind in vars(builtins).items() if isinstance(kind, type) and issubclass(kind, Exception)}
    ours = {"JaxdiffError"}
    while more := {name for name, bases in classes.items() if bases & ours} - ours:
        ours |= more
    errors = {name for name, bases in classes.items() if bases & builtin}
    assert errors <= ours
    assert {"ConfigError", "WeightsError"} <= ours


def test_importing_the_package_is_light():
    code = f"import sys, jaxdiff; print(sorted(set({LAZY}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
