"""Draw images from text: `python sample.py --prompt "a castle"`; the same as the installed command jaxdiff-sample."""

import sys

from jaxdiff.cli.sample import main

if __name__ == "__main__":
    sys.exit(main())
