"""Every command and every Python block of the documentation runs as it is written, on small stand-ins and in few steps.

A page's blocks run in their order in one folder that holds what a user would have. A command is run (`documented.RUN`)
or named with a reason (`documented.NOT_RUN`); one that is neither fails.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support import documented, documents
from tests.support.documents import ROOT, blocks, commands, program


def shell(page: str) -> list[list[str]]:
    """The commands of a page's blocks, in their order."""
    return [words for block in blocks(page) if block.language == "bash" for words in commands(block.text)]


PAGES = documents.files(documents.PAGES)
RUNNABLE = [page for page in PAGES if any(block.language in ("bash", "python") for block in blocks(page))]
# Pages that are about training run with `make test-all` alone; on other pages a command that trains does.
ABOUT_TRAINING = ("docs/data.md", "docs/icons.md", "docs/training.md", "jaxdiff/bundled/icons/README.md")
TRAINING = [page for page in RUNNABLE if page in ABOUT_TRAINING or any(map(documented.trains, shell(page)))]
# Names that a page's excerpts take for granted.
GIVEN = {
    "docs/python.md": "def refiner_denoise(x, time): return denoise(x, time)",
    "docs/evaluation.md": """
import numpy as np
pixels = np.random.default_rng(0).integers(0, 256, (24, 16, 16, 3)).astype(np.uint8)
real = np.random.default_rng(1).standard_normal((24, 6)).astype(np.float32)
chunks, groups = [real], np.arange(24) // 2
""",
}
# That file names in prose are relative to.
FOLDERS = (".", "jaxdiff", *(f"jaxdiff/{part}" for part in ("diffusion", "training", "models", "io")), "examples")
# ml_collections loads configs by a method that Python has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


@pytest.fixture(scope="module")
def bundled(tmp_path_factory, tiny_folder):
    """In place of the models that ship."""
    models = tmp_path_factory.mktemp("bundled")
    (models / "icons").symlink_to(tiny_folder)
    return models


@pytest.fixture
def folder(tmp_path, monkeypatch, bundled):
    """A small world to run in."""
    monkeypatch.setattr("sys.argv", [])
    return documented.small_world(tmp_path, bundled, monkeypatch)


@pytest.mark.parametrize("page", PAGES)
def test_every_block_has_a_language_and_every_command_a_place(page):
    for block in blocks(page):
        assert block.language in ("bash", "python", "json", "text"), block.place
    for words in shell(page):
        name, _ = program(words)
        assert (name in documented.RUN) != (name in documented.NOT_RUN), name


def run(page: str, folder: Path, capsys, train: bool) -> None:
    """Run a page's blocks; without the commands that train, stand-ins take the place of what those write."""
    namespace: dict = {}
    exec(GIVEN.get(page, ""), namespace)
    for block in blocks(page):
        documented.furnish(folder, block.text)
        if block.language == "python":
            text = block.text
            for ours, small in documented.SMALLER.items():
                text = text.replace(ours, small)
            exec(compile("\n" * (block.line - 1) + text, str(ROOT / page), "exec"), namespace)
        elif block.language == "bash":
            for words in commands(block.text):
                name, arguments = program(words)
                if name not in documented.RUN or (documented.trains(words) and not train):
                    continue
                if documented.RUN[name](arguments) != 0:
                    pytest.fail(f"{block.place}: {' '.join(words)}\n{capsys.readouterr().err}")
    check_ignored(folder)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in RUNNABLE if page not in ABOUT_TRAINING])
def test_every_block_runs_in_its_place(page, folder, capsys):
    run(page, folder, capsys, train=False)


@pytest.mark.slow
@pytest.mark.parametrize("page", TRAINING)
def test_every_block_runs_in_its_place_and_trains(page, folder, capsys):
    run(page, folder, capsys, train=True)


def check_ignored(folder: Path) -> None:
    """What a page's commands write is nothing that git would add, were it written in a checkout."""
    given = {Path(name).parts[0] for name in documented.STAND_INS} | {"configs", "config.json"}
    made = [p.name + "/" * p.is_dir() for p in folder.iterdir() if p.name not in given]
    if shutil.which("git") is None or not (ROOT / ".git").exists() or not made:
        return
    git = ["git", "check-ignore", "--no-index", "--stdin"]
    done = subprocess.run(git, cwd=ROOT, input="\n".join(made), capture_output=True, text=True)
    assert set(made) == set(done.stdout.split("\n")[:-1])


def wrong(found: list[tuple[str, list[str]]]) -> str:
    """What is not right about commands, each with the file that has it, a line each."""
    sentences = []
    for place, words in found:
        try:
            documented.check(*program(words))
        except (Exception, SystemExit) as e:
            sentences.append(f"{place}: {' '.join(words)}: {e}")
    return "\n".join(sentences)


def test_commands_and_flags_of_all_pages_exist(folder):
    documented.image(folder / "castle.png")
    assert not wrong([(page, words) for page in PAGES for words in shell(page) + documents.inline_commands(page)])
    others = {
        "logdir",
        "command",
        "worker",
        "max",
        "num",
        "signal",
        "ar",
    }  # of TensorBoard, gcloud, xpk, Slurm, Midjourney
    known = documented.known_flags() | others
    assert not {page: unknown for page in PAGES if (unknown := documents.inline_flags(page) - known)}


def test_commands_of_docstrings_exist(folder):
    documented.image(folder / "castle.png")
    scripts = documents.files(documents.SCRIPTS)
    assert not wrong([(script, words) for script in scripts for words in documents.docstring_commands(script)])


@pytest.mark.parametrize("page", PAGES)
def test_links_and_named_files_exist(page):
    for link in documents.links(page):
        assert ((ROOT / page).parent / link).exists(), link
    for name in documents.named_files(page):
        assert any((ROOT / folder / name).is_file() for folder in (*FOLDERS, Path(page).parent)), name


def test_what_is_compatible_names_its_tests():
    rows = re.findall(
        r"^\|.*\| `(test_\w+)(?:::(test_\w+))?` \|$", (ROOT / "docs" / "compatibility.md").read_text(), re.M
    )
    assert len(rows) > 30
    for file, test in rows:
        assert f"def {test or 'test_'}" in (ROOT / "tests" / f"{file}.py").read_text(), (file, test)
