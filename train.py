"""Train a text-to-image model, or fine-tune one: `python train.py --help`, see jaxdiff/cli/train.py."""

import sys

from jaxdiff.cli.train import main

if __name__ == "__main__":
    sys.exit(main(sys.argv))
