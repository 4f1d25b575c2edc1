"""The SHA-256 of each file of a checkpoint, stored beside them.

Orbax does not detect every flipped byte, so the checksums are verified before a checkpoint is read.
"""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SUMS = "sha256.json"
UNCHECKED = (SUMS, "_CHECKPOINT_METADATA", "commit_success.txt")  # orbax writes these last, and reads nothing from them


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a checkpoint, by its path in the checkpoint's folder."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.relative_to(folder).as_posix() not in UNCHECKED)

    def digest(path: Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor() as pool:  # hashlib releases the GIL
        return dict(zip((p.relative_to(folder).as_posix() for p in files), pool.map(digest, files), strict=True))


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint: a missing, changed or additional file; None if it is intact."""
    try:
        expected = json.loads((folder / SUMS).read_text(encoding="utf-8"))
        actual = digests(folder)
    except (OSError, ValueError) as e:
        return f"{SUMS} cannot be read: {reason(e)}"
    if not isinstance(expected, dict):
        return f"{SUMS} holds no sums"
    for name in sorted(expected.keys() | actual.keys()):
        if name not in actual:
            return f"{name} is missing, which {SUMS} lists"
        if expected.get(name) != actual[name]:
            return f"{name} holds other bytes than {SUMS} says"
    return None


def reason(error: BaseException) -> str:
    """The first line of an error's message."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    for known in ("No space left on device", "File too large", "Disk quota exceeded", "Permission denied"):
        if known.lower() in str(error).lower():
            return known
    return (str(error).strip() or type(error).__name__).split("\n")[0][:200]
