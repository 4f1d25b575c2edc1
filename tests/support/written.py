"""Files that tests write, and what lies in a folder."""

import json
import struct
from pathlib import Path

import numpy as np
from PIL import Image

from tests.support.tiny import SIDE


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def safetensors(header: bytes | dict, data: bytes = bytes(16)) -> bytes:
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + data


def entry(begin: int, end: int, shape=(2,), dtype="F32") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def existing(folder=".") -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in Path(folder).rglob("*") if p.is_file())


def write_squares(folder: Path) -> Path:
    lines = [{"file_name": f"{i}.png", "text": [f"a square {i}", f"number {i}"]} for i in range(9)]
    for i, line in enumerate(lines):
        Image.fromarray(np.full((SIDE, SIDE, 3), 25 * i, np.uint8)).save(folder / line["file_name"])
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder
