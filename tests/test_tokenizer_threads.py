"""Tokenizers that several threads open first."""

import subprocess
import sys
from pathlib import Path

import jaxdiff

PROGRAM = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from jaxdiff.text.tokenizer_files import open_files
assert "transformers" not in sys.modules
files = {path.name: path.read_bytes() for path in Path(sys.argv[1]).iterdir()}
with ThreadPoolExecutor(4) as threads:
    opened = list(threads.map(lambda _: type(open_files("CLIPTokenizer", files)).__name__, range(4)))
print(*opened)
"""


def test_threads_that_open_a_tokenizer_first_wait_for_transformers():
    folder = Path(jaxdiff.__file__).parent / "bundled/icons/tokenizer"
    run = subprocess.run([sys.executable, "-c", PROGRAM, folder], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["CLIPTokenizer"] * 4
