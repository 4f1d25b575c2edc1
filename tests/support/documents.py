"""What the documentation says to run: its fenced blocks, the commands in them, its inline flags and its links."""

import ast
import dataclasses
import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PAGES = ("README.md", "CONTRIBUTING.md", "docs/*.md", "docs/adr/*.md", "examples/*.md", "benchmarks/*.md",
         "jaxdiff/bundled/*/README.md", "datasets/**/*.md")  # fmt: skip
SCRIPTS = ("sample.py", "train.py", "configs/**/*.py", "examples/*.py", "benchmarks/*.py", "datasets/**/*.py",
           "jaxdiff/**/*.py")  # fmt: skip
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
STARTS = ("python ", "jaxdiff-", ".venv/bin/", "pip ", "make ")  # of a line that is a command


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block, its lines without the indentation of the fence."""

    page: str
    line: int  # of its first line in the page
    language: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


def files(patterns: tuple[str, ...]) -> list[str]:
    return [str(p.relative_to(ROOT)) for pattern in patterns for p in sorted(ROOT.glob(pattern))]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(page: str) -> list[Block]:
    text, found = read(page), []
    for match in FENCE.finditer(text):
        indent, language, inner = match.groups()
        lines = [line.removeprefix(indent) for line in inner.splitlines(keepends=True)]
        found.append(Block(page, text.count("\n", 0, match.start(3)) + 1, language, "".join(lines)))
    return found


def commands(text: str) -> list[list[str]]:
    """Lines of a shell as commands: their words, with `\\`, `#` and `&&` seen to."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            found.append(words[:end])
            words = words[end + 1 :]
    return found


def program(words: list[str]) -> tuple[str, list[str]]:
    """What a command runs, a script, a module or a tool by its name, and its arguments."""
    name, rest = Path(words[0]).name, words[1:]
    if re.fullmatch(r"python[\d.]*", name):
        name, *rest = rest[1:] if rest[0] == "-m" else rest
    return name, rest


def inline_code(page: str) -> list[str]:
    """The `code` between backticks, each on one line; without the fenced blocks."""
    text = FENCE.sub("", read(page))
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text)]


def inline_commands(page: str) -> list[list[str]]:
    return [words for code in inline_code(page) if code.startswith(STARTS) for words in commands(code)]


def docstring_commands(script: str) -> list[list[str]]:
    """The lines of a module's docstring that are commands; brackets mark what may be left out."""
    text = (ast.get_docstring(ast.parse(read(script))) or "").replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.strip().startswith(STARTS)]
    lines += [code for code in re.findall(r"`([^`]+)`", text) if code.startswith(STARTS)]
    return [words for line in lines for words in commands(re.sub(r"(?<!\S)\[|\]+(?!\S)", "", line))]


def inline_flags(page: str) -> set[str]:
    """The flags that its prose names, without values: "steps", "config.data.path"."""
    prose = [code for code in inline_code(page) if not code.startswith(STARTS)]
    return {flag for code in prose for flag in re.findall(r"(?:^|\s)--([\w.]+)", code)}


def named_files(page: str) -> set[str]:
    """The Python files that its prose names, with or without their folders."""
    return {name for code in inline_code(page) for name in re.findall(r"(?<![\w/.-])[\w-]+(?:/[\w-]+)*\.py\b", code)}


def links(page: str) -> set[str]:
    """Paths within the repository that a page links to, relative to the page."""
    found = re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", read(page)))
    return {link.partition("#")[0] for link in found if "://" not in link and not link.startswith("#")}
