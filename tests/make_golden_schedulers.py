"""Remake tests/golden/schedulers.npz from diffusers: `python -m tests.make_golden_schedulers`.

Nothing else ever writes it.
"""

from pathlib import Path

import numpy as np

from tests.support import scheduler_oracle
from tests.support.scheduler_cases import cases

GOLDEN = Path(__file__).parent / "golden" / "schedulers.npz"


def main() -> None:
    outputs = {str(case): scheduler_oracle.run(case) for case in cases()}
    GOLDEN.parent.mkdir(exist_ok=True)
    np.savez_compressed(GOLDEN, **outputs)
    print(f"{GOLDEN}: {len(outputs)} arrays, {GOLDEN.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
