"""One of several processes that train together on a folder of images.

Usage: python -m tests.support.train_on_hosts PORT PROCESS PROCESSES DATA WORKDIR STEPS
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np
from PIL import Image

BATCH = 8  # of all processes together


def write_images(folder: Path, count: int = 13) -> Path:
    """A captioned folder of plain squares, one of which cannot be read."""
    folder.mkdir()
    lines = []
    for i in range(count):
        lines.append({"file_name": f"{i}.png", "text": [f"{i}", f"number {i}"]})
        Image.fromarray(np.full((8, 8, 3), (19 * i, 255 - 19 * i, 7 * i), np.uint8)).save(folder / f"{i}.png")
    (folder / "3.png").write_bytes(b"no image")
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def prepare(batch):
    colours = (batch["image"][:, 0, 0] / 255.0).astype(np.float32)
    lengths = np.asarray([len(text) for text in batch["text"]], np.float32)  # which of the captions was drawn
    return {"x": colours, "y": colours[:, 0] + 0.1 * lengths, "index": np.arange(len(colours))}


def main(port: int, process: int, processes: int, data: Path, workdir: Path, steps: int) -> None:
    if processes > 1:
        jax.distributed.initialize(f"localhost:{port}", processes, process)
    from jaxdiff.data.captioned import captioned_data
    from jaxdiff.training.loop import fit
    from tests.support.line import LINE, linear_stage
    from tests.support.stages import options

    hosts = {"host_index": process, "host_count": processes}
    batches = captioned_data(data, BATCH // processes, 8, seed=5, threads=1, **hosts)
    chosen = options(steps=steps, batch_size=BATCH, checkpoint_every=2, learning_rate=0.05)
    result = fit(linear_stage()._replace(prepare=prepare), LINE, batches, chosen, workdir)
    np.savez(workdir / f"result-{process}.npz", w=result.params["line"]["w"], step=result.step)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]), *map(Path, sys.argv[4:6]), int(sys.argv[6]))
