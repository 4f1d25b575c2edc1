"""The tables of `words.toml`: what things are called, and which words are special."""

import tomllib
from pathlib import Path

WORDS = tomllib.loads(Path(__file__).with_name("words.toml").read_text(encoding="utf-8"))
COLOR_WORDS = frozenset(WORDS["colors"])
