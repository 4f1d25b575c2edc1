"""Remake tests/golden/models.npz from PyTorch: `python -m tests.make_golden`. Nothing else ever writes it."""

from pathlib import Path

import numpy as np

from tests.support import oracle

GOLDEN = Path(__file__).parent / "golden" / "models.npz"


def main() -> None:
    outputs = {}
    for name, (build, run, inputs) in oracle.cases().items():
        outputs |= {f"{name}:{key}": value for key, value in run(build(), inputs).items()}
    GOLDEN.parent.mkdir(exist_ok=True)
    np.savez_compressed(GOLDEN, **outputs)
    print(f"{GOLDEN}: {len(outputs)} arrays, {GOLDEN.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
