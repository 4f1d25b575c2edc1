"""Build the icons set: `python -m datasets.icons --out data/icons`. Needs `pip install ".[data]"` and npm."""

import sys
from pathlib import Path

from absl import app, flags, logging

from datasets.icons.fetch import BuildError
from datasets.icons.sources import SOURCES, select

_OUT = flags.DEFINE_string("out", "data/icons", "Folder that the set is built in.")
_SIZE = flags.DEFINE_integer("size", 128, "Side of the images, in pixels.", lower_bound=32, upper_bound=1024)
_SOURCES = flags.DEFINE_string(
    "sources", "all", f"Comma-separated sources to draw: {', '.join(source.name for source in SOURCES)}; or all."
)
_CACHE = flags.DEFINE_string("cache", "~/.cache/jaxdiff/icons", "Folder that fetched packages are kept in.")
_PROCESSES = flags.DEFINE_integer("processes", 2, "How many processes draw at once.", lower_bound=1)
_FLAGS = flags.DEFINE_bool("country_flags", False, "Draw the flags of countries, too.")


def main(argv: list[str]) -> None:
    """Build the set that the flags describe; exit with 1 and one sentence when that fails."""
    if len(argv) > 1:
        raise app.UsageError(
            f"{argv[1]!r} is not a flag: this command takes only flags, such as --out data/icons.", exitcode=2
        )
    try:
        sources = select(_SOURCES.value)
    except ValueError as error:
        raise app.UsageError(str(error), exitcode=2) from error
    try:
        from datasets.icons.build import build
    except ModuleNotFoundError as error:
        sys.exit(f"{error.name} is missing: run pip install '.[data]', which installs what draws the icons set.")
    out = Path(_OUT.value)
    try:
        counts = build(out, Path(_CACHE.value).expanduser(), sources, _SIZE.value, _PROCESSES.value, _FLAGS.value)
    except BuildError as error:
        sys.exit(str(error))
    logging.info("%s: %s", out, ", ".join(f"{count} {split}" for split, count in sorted(counts.items())))


if __name__ == "__main__":
    app.run(main)
