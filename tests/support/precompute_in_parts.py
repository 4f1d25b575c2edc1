"""One of several processes that write latents together.

Usage: python -m tests.support.precompute_in_parts DATA FOLDER PROCESS PROCESSES SECONDS.
Each part takes at least so many seconds.
"""

import sys
import time
from pathlib import Path

HOW = {"seed": 3, "views": 2, "part": 5, "batch_size": 4, "threads": 2, "embeddings": True}


def main(data: str, folder: Path, process: int, processes: int, seconds: float) -> None:
    from absl import logging

    from jaxdiff.data.captioned import open_source
    from jaxdiff.training import precompute as module
    from tests.support.tiny import SIDE, tiny_model, tiny_params

    logging.set_verbosity(logging.INFO)  # says which parts it makes
    encoder = module.encoder

    def slow(*args):
        run = encoder(*args)

        def every(rows):
            time.sleep(seconds)
            return run(rows)

        return every

    module.encoder = slow
    model = tiny_model()
    hosts = {"host_index": process, "host_count": processes}
    module.precompute(model, tiny_params(model), open_source(data), folder, image_size=SIDE, **HOW, **hosts)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5]))
