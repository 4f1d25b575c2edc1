"""The SHA-256 of each file of a checkpoint, among them: what tells that it is whole.

Orbax itself does not notice every flipped byte, so that the sums are compared before a checkpoint is read.
"""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SUMS = "sha256.json"
UNCHECKED = (SUMS, "_CHECKPOINT_METADATA", "commit_success.txt")  # orbax writes these last, and reads nothing from them


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a checkpoint's folder, by its path in there."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.relative_to(folder).as_posix() not in UNCHECKED)

    def digest(path: Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor() as pool:  # the sums are computed without Python's lock
        return dict(zip((p.relative_to(folder).as_posix() for p in files), pool.map(digest, files), strict=True))


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, None if nothing: a file that is missing, of other bytes, or one too many."""
    try:
        wanted = json.loads((folder / SUMS).read_text(encoding="utf-8"))
        found = digests(folder)
    except (OSError, ValueError) as e:
        return f"{SUMS} cannot be read: {reason(e)}"
    if not isinstance(wanted, dict):
        return f"{SUMS} holds no sums"
    for name in sorted(wanted.keys() | found.keys()):
        if name not in found:
            return f"{name} is missing, which {SUMS} lists"
        if wanted.get(name) != found[name]:
            return f"{name} holds other bytes than {SUMS} says"
    return None


def reason(error: BaseException) -> str:
    """What an error says, without what follows its first line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    for known in ("No space left on device", "File too large", "Disk quota exceeded", "Permission denied"):
        if known.lower() in str(error).lower():
            return known
    return (str(error).strip() or type(error).__name__).split("\n")[0][:200]
