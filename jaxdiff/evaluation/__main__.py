"""`python -m jaxdiff.evaluation`: see `jaxdiff.evaluation.command`."""

import sys

from jaxdiff.evaluation.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv))
