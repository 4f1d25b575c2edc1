"""The table of packages the icons set is drawn from, and of the styles that it names."""

from typing import Literal, NamedTuple


class Style(NamedTuple):
    """A way of drawing, and how captions say it."""

    name: str  # canonical: the `style` column, the held-out pairs, and the first caption use it
    also: tuple[str, ...] = ()  # other words for it, used after a comma: "a castle, <words>"
    of: str = ""  # what goes before the subject: "<words> a castle"


class Source(NamedTuple):
    """One package of drawings, pinned."""

    name: str
    kind: Literal["iconify", "webp", "openclipart"]
    package: str
    version: str
    style: Style
    license: str
    author: str
    url: str
    paintings: bool = False  # its drawings are also painted over by every filter
    recolor: bool = False  # one-colour drawings, filled with named colours
    tint: bool = False  # colour drawings of things are also given other colours
    trim: bool = False  # cut to the ink: the canvas of these drawings is mostly empty


BW_CLIP_ART = Style("black and white clip art", ("black and white drawing",), "a black and white clip art of")
OUTLINE_WEATHER = Style("outline weather icon", ("thin line weather icon",), "an outline weather icon of")

SOURCES = (
    Source(
        "noto",
        "iconify",
        "@iconify-json/noto",
        "1.2.9",
        Style("cartoon emoji", ("noto emoji", "cartoon"), "a cartoon emoji of"),
        "Apache-2.0",
        "Google Inc",
        "https://github.com/googlefonts/noto-emoji",
        paintings=True,
        tint=True,
    ),
    Source(
        "noto-v1",
        "iconify",
        "@iconify-json/noto-v1",
        "1.2.5",
        Style("blob emoji", ("rounded cartoon emoji",), "a blob emoji of"),
        "Apache-2.0",
        "Google Inc",
        "https://github.com/googlefonts/noto-emoji",
    ),
    Source(
        "fluent-gradient",
        "iconify",
        "@iconify-json/fluent-emoji",
        "1.2.7",
        Style("gradient illustration", ("soft gradient emoji", "glossy illustration"), "a gradient illustration of"),
        "MIT",
        "Microsoft Corporation",
        "https://github.com/microsoft/fluentui-emoji",
        paintings=True,
    ),
    Source(
        "fluent-flat",
        "iconify",
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        Style("flat emoji", ("flat design", "flat illustration", "flat icon"), "a flat emoji of"),
        "MIT",
        "Microsoft Corporation",
        "https://github.com/microsoft/fluentui-emoji",
        tint=True,
    ),
    Source(
        "fluent-mono",
        "iconify",
        "@iconify-json/fluent-emoji-high-contrast",
        "1.2.6",
        Style("single color icon", ("monochrome icon", "stencil"), "a single color icon of"),
        "MIT",
        "Microsoft Corporation",
        "https://github.com/microsoft/fluentui-emoji",
        recolor=True,
    ),
    Source(
        "fluent-3d",
        "webp",
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        Style("3d render", ("3d", "3d emoji", "3d rendering"), "a 3d render of"),
        "MIT",
        "Microsoft Corporation, packaged by LobeHub",
        "https://github.com/microsoft/fluentui-emoji",
        tint=True,
    ),
    Source(
        "fxemoji",
        "iconify",
        "@iconify-json/fxemoji",
        "1.2.2",
        Style("firefox emoji", ("retro flat emoji",), "a firefox emoji of"),
        "Apache-2.0",
        "Mozilla",
        "https://github.com/mozilla/fxemoji",
    ),
    Source(
        "flat-color-icons",
        "iconify",
        "@iconify-json/flat-color-icons",
        "1.2.3",
        Style("flat color icon", ("flat colour icon", "user interface icon"), "a flat color icon of"),
        "MIT",
        "Icons8",
        "https://github.com/icons8/flat-Color-icons",
    ),
    Source(
        "meteocons",
        "iconify",
        "@iconify-json/meteocons",
        "1.2.4",
        Style("weather icon", ("weather forecast icon",), "a weather icon of"),
        "MIT",
        "Bas Milius",
        "https://github.com/basmilius/weather-icons",
        trim=True,
    ),
    Source(
        "twemoji",
        "iconify",
        "@iconify-json/twemoji",
        "1.2.5",
        Style("twitter emoji", ("twemoji", "minimal flat emoji"), "a twitter emoji of"),
        "CC-BY-4.0",
        "Twitter, Inc and other contributors",
        "https://github.com/jdecked/twemoji",
    ),
    Source(
        "emojione",
        "iconify",
        "@iconify-json/emojione",
        "1.2.3",
        Style("emojione emoji", ("bright cartoon emoji",), "an emojione emoji of"),
        "CC-BY-4.0",
        "Emoji One",
        "https://github.com/EmojiTwo/emojitwo",
    ),
    Source(
        "streamline",
        "iconify",
        "@iconify-json/streamline-emojis",
        "1.2.4",
        Style("outlined cartoon", ("comic drawing", "streamline emoji"), "an outlined cartoon of"),
        "CC-BY-4.0",
        "Streamline",
        "https://github.com/webalys-hq/streamline-vectors",
    ),
    Source(
        "openclipart",
        "openclipart",
        "openclipart-svg",
        "1:0.18+dfsg-19",
        Style("clip art", ("clipart", "vector drawing"), "a clip art of"),
        "public domain",
        "the artists of the Open Clip Art Library",
        "https://packages.debian.org/bookworm/openclipart-svg",
        trim=True,
    ),
)
WORDS_PACKAGE, WORDS_VERSION = "emojibase-data", "17.0.0"

# The styles that filters.py paints; the keys are its filters' names.
PAINTINGS = {
    "watercolor": Style(
        "watercolor painting",
        ("watercolour painting", "watercolor", "fine art illustration"),
        "a watercolor painting of",
    ),
    "oil": Style(
        "oil painting on canvas",
        ("oil painting", "picture painted onto canvas", "painting on canvas", "fine art painting"),
        "an oil painting of",
    ),
    "pencil": Style("pencil sketch", ("pencil drawing", "sketch"), "a pencil sketch of"),
    "pixel": Style("pixel art", ("8-bit pixel art",), "pixel art of"),
    "line": Style("line drawing", ("ink line drawing", "black and white line drawing"), "a line drawing of"),
}
SILHOUETTE = Style("silhouette", (), "a silhouette of")
COLORLESS = ("pencil", "line")  # paintings that show no colour

# Named colours of recoloured drawings, sRGB. White is none of them: on white paper it would be a blank picture.
COLORS = {
    "black": (0, 0, 0),
    "grey": (128, 128, 128),
    "red": (220, 30, 30),
    "orange": (250, 135, 20),
    "yellow": (245, 210, 20),
    "green": (40, 160, 60),
    "teal": (20, 150, 150),
    "blue": (30, 90, 220),
    "purple": (130, 50, 190),
    "pink": (245, 110, 175),
    "brown": (125, 75, 35),
}


def select(names: str) -> tuple[Source, ...]:
    """The sources of a comma-separated list of names, in the table's order; "all" or "" means every one.

    Raises:
        ValueError: a name is not in the table; the sentence lists those that are.
    """
    wanted = {name.strip() for name in names.split(",") if name.strip()}
    known = {source.name for source in SOURCES}
    if not wanted or wanted == {"all"}:
        return SOURCES
    if unknown := sorted(wanted - known):
        raise ValueError(f"--sources: unknown {', '.join(unknown)}; the known ones are {', '.join(sorted(known))}.")
    return tuple(source for source in SOURCES if source.name in wanted)
