"""Filters: which examples are used, by metadata, size, caption length, scores and similarity to others.

What filters need to know of each example is found in one pass, in parts that hosts divide and that stay in the cache.
"""

import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from PIL import Image

from jaxdiff.config import ConfigError
from jaxdiff.data import store
from jaxdiff.data.hashes import content_hash, dhash, near_duplicates
from jaxdiff.data.images import FORMATS, open_image
from jaxdiff.data.source import Source, Subset

PART = 2**14  # examples scanned at a time
SETTINGS = (
    "min_side",
    "max_aspect",
    "min_caption",
    "max_caption",
    "where",
    "duplicates",
    "duplicate_bits",
    "max_subjects",
)
CONDITION = re.compile(r"([^<>=!\s]+)\s*(?:(>=|<=|>|<)\s*([-+0-9.eE]+)|==?\s*(.+))", re.DOTALL)
QUOTED = re.compile(r"(['\"]).*\1", re.DOTALL)
COMPARE: Mapping[str, Callable[[np.ndarray, float], np.ndarray]] = {
    ">=": np.greater_equal, "<=": np.less_equal, ">": np.greater, "<": np.less, "=": np.equal,
}  # fmt: skip
NAME_BYTES = 64  # kept of a column's value, to order equally common values by
LAYOUT = 3  # version of what a scan keeps on disk


class Condition(NamedTuple):
    """One of `where`."""

    text: str
    column: str
    sign: str  # of COMPARE
    bound: float  # nan where it is no number
    values: tuple[str, ...]  # JSON of what "=" allows


def scan(
    source: Source,
    *,
    sizes: bool = False,
    columns: Sequence[str] = (),
    names: Sequence[str] = (),
    hashes: str = "",
    cache: Path | None = None,
    host_index: int = 0,
    host_count: int = 1,
    threads: int = 8,
) -> dict[str, np.ndarray]:
    """What filters need to know of each example, as arrays [N].

    Args:
        sizes: adds "width" and "height" in pixels, upright, from metadata of those names if any, otherwise from the
            image's header. 0 for an unreadable image.
        columns: adds metadata as "column:<name>" uint64, a hash of the value's JSON, which differs for 1, "1" and no
            value; and "number:<name>" float64, nan for what is not a number.
        names: columns of which "name:<name>" holds the first NAME_BYTES of the JSON. Values may be long; nothing else
            of them is kept.
        hashes: "exact" or "near" adds "hash" uint64, of the file or of what the image shows, and "hashed" bool, whether
            it could be read. Without that the hash has no meaning: every number is a possible hash.
        cache: folder that keeps the result; hosts that share it divide the work.

    Returns:
        These arrays, and "caption" int32: characters of the shortest caption.
    """
    asked = json.dumps([LAYOUT, source.digest, sizes, list(columns), list(names), hashes, PART])
    starts = range(0, len(source), PART)

    def look(index: int) -> dict[str, Any]:
        return _look(source, index, sizes, columns, names, hashes)

    def make(part: int) -> dict[str, np.ndarray]:
        start = starts[part]
        with ThreadPoolExecutor(threads) as pool:
            found = list(pool.map(look, range(start, min(start + PART, len(source)))))
        return {name: np.asarray([f[name] for f in found]) for name in found[0]}

    if cache is None:
        parts: list[Mapping[str, np.ndarray]] = [make(i) for i in range(len(starts))]
    else:
        folder = cache / f"scan-{hashlib.sha256(asked.encode()).hexdigest()[:16]}"
        files = [f"{i:06d}" for i in range(len(starts))]
        store.fill(folder, files, make, host_index=host_index, host_count=host_count)
        parts = [store.read_part(folder / file) for file in files]
    return {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}


def _look(
    source: Source, index: int, sizes: bool, columns: Sequence[str], names: Sequence[str], hashes: str
) -> dict[str, Any]:
    found: dict[str, Any] = {"caption": np.int32(0), **_values({}, columns, names)}
    found |= {"width": np.int32(0), "height": np.int32(0)} if sizes else {}
    found |= {"hash": np.uint64(0), "hashed": np.bool_(False)} if hashes else {}
    try:
        record = source.read(index, image=bool(hashes))
        found["caption"] = np.int32(min(map(len, record.captions)))
        found |= _values(record.extras, columns, names)
        given: Any = record.extras.get("width"), record.extras.get("height")
        known = all(isinstance(n, int) and 0 < n < 2**31 for n in given)
        if (sizes and not known) or hashes:
            image = (record if hashes else source.read(index)).image
            data = image if isinstance(image, bytes) else Path(image).read_bytes()
            if sizes and not known:
                given = _size(data)
            if hashes:
                number = content_hash(data) if hashes == "exact" else dhash(open_image(data, 9))
                found |= {"hash": np.uint64(number), "hashed": np.bool_(True)}
        if sizes:
            found |= {"width": np.int32(given[0]), "height": np.int32(given[1])}
    except Exception as e:  # damaged in any way; training names it when it reads it
        logging.log_first_n(logging.WARNING, "Example %d of %s cannot be read: %s", 10, index, source.name, e)
    return found


def _values(extras: Mapping[str, Any], columns: Sequence[str], names: Sequence[str]) -> dict[str, Any]:
    """What a scan keeps of an example's metadata."""
    text = {name: json.dumps(extras.get(name), default=str) for name in (*columns, *names)}
    numbers = {c: float(v) if isinstance(v := extras.get(c), int | float) else np.nan for c in columns}
    return {
        **{f"column:{c}": _hash(text[c]) for c in columns},
        **{f"number:{c}": numbers[c] for c in columns},
        **{f"name:{c}": text[c].encode()[:NAME_BYTES] for c in names},
    }


def _hash(text: str) -> np.uint64:
    return np.uint64(content_hash(text.encode()))


def _size(data: bytes) -> tuple[int, int]:
    """Width and height of an encoded image, upright."""
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        # Pillow decodes a PNG before it looks for what hardly any PNG has.
        turned = image.format != "PNG" and image.getexif().get(0x0112, 1) >= 5
        return (image.height, image.width) if turned else (image.width, image.height)


def select(
    source: Source, wanted: Mapping[str, Any], *, cache: Path | None = None, host_index: int = 0, host_count: int = 1,
    threads: int = 8,
) -> Source:  # fmt: skip
    """The examples of a source that pass all filters. The log says how many each filter drops.

    Args:
        wanted: any of
            min_side: pixels of the shorter side, at least; 0: off.
            max_aspect: longer side divided by shorter, at most; 0: off.
            min_caption, max_caption: characters of the shortest caption; 0: off.
            where: conditions on columns. "aesthetic>=5", with one of >=, <=, > and <, drops examples without that
                number. "license=CC0" (or ==) keeps those whose value is that text, number, true, false or null; quoted,
                as in "year='2020'", only that text.
            duplicates: "exact" keeps the first of equal files, "near" the first of those that differ in at most
                `duplicate_bits` of 64 bits of a hash of what they show; "": off.
            max_subjects: keeps the examples with that many values of the column "subject", the commonest; 0: all.
            any other name: allowed values of the column of that name; () allows all.

    Raises:
        ConfigError: a filter has an invalid value, or no example is left.
    """
    conditions = [_condition(text) for text in wanted.get("where", ())]
    if (kind := wanted.get("duplicates", "")) not in ("", "exact", "near"):
        raise ConfigError(f'data.filter.duplicates must be "exact", "near" or "", not {kind!r}.')
    if not 0 <= (bits := wanted.get("duplicate_bits", 4)) <= 16:
        raise ConfigError(f"data.filter.duplicate_bits must be from 0 to 16, not {bits}.")
    allowed = {k: tuple(v) for k, v in wanted.items() if k not in SETTINGS and v}
    sizes = bool(wanted.get("min_side") or wanted.get("max_aspect"))
    names = ["subject"] if wanted.get("max_subjects") else []
    columns = sorted({*allowed, *(condition.column for condition in conditions), *names})
    if not (columns or sizes or kind or wanted.get("min_caption") or wanted.get("max_caption")):
        return source
    hosts: Any = {"cache": cache, "host_index": host_index, "host_count": host_count, "threads": threads}
    found = scan(source, sizes=sizes, columns=columns, names=names, hashes=kind, **hosts)
    kept = np.ones(len(source), bool)
    dropped: dict[str, int] = {}
    for reason, bad in _drops(found, wanted, allowed, conditions, kept):
        if count := int((bad & kept).sum()):
            dropped[reason] = count
        kept &= ~bad
    reasons = ", ".join(f"{name} {count}" for name, count in dropped.items())
    if not kept.any():
        raise ConfigError(
            f"data.filter leaves no image of the {len(source)} of {source.name}; it drops {reasons}: allow more."
        )
    if kept.all():
        return source
    logging.info("%d of %d images of %s pass the filters; dropped: %s.", kept.sum(), len(kept), source.name, reasons)
    return Subset(source, np.flatnonzero(kept))


def _drops(
    found: Mapping[str, np.ndarray],
    wanted: Mapping[str, Any],
    allowed: Mapping[str, tuple[Any, ...]],
    conditions: Sequence[Condition],
    kept: np.ndarray,
) -> Iterator[tuple[str, np.ndarray]]:
    """(a filter, whether it drops each example, bool [N]) of every filter in turn.

    Args:
        found: of `scan`.
        wanted: the filters, see `select`.
        allowed: of them, those by the values of a column.
        conditions: those of `where`.
        kept: bool [N], the examples that the filters before have kept; the caller updates it.
    """
    for name, values in allowed.items():
        yield name, ~np.isin(found[f"column:{name}"], [_hash(json.dumps(v)) for v in values])
    for condition in conditions:
        yield condition.text, ~_meets(condition, found)
    if "width" in found:
        short, long = (f(found["width"], found["height"]) for f in (np.minimum, np.maximum))
        yield "unreadable", short == 0
        yield "min_side", short < wanted.get("min_side", 0)
        yield "max_aspect", long > (wanted.get("max_aspect") or np.inf) * np.maximum(short, 1)
    yield "min_caption", found["caption"] < wanted.get("min_caption", 0)
    yield "max_caption", found["caption"] > (wanted.get("max_caption") or np.inf)
    if kind := wanted.get("duplicates"):
        left = np.flatnonzero(kept & found["hashed"])
        bad = np.zeros(len(kept), bool)
        bad[left[near_duplicates(found["hash"][left], wanted.get("duplicate_bits", 4) if kind == "near" else 0)]] = True
        yield "duplicates", bad
    if most := int(wanted.get("max_subjects", 0)):
        yield "max_subjects", ~_commonest(found["column:subject"], found["name:subject"], kept, most)


def _condition(text: str) -> Condition:
    text = str(text).strip()
    match = CONDITION.fullmatch(text)
    column, sign, bound, value = match.groups() if match else ("", "", "", "")
    if value and QUOTED.fullmatch(value):
        return Condition(text, column, "=", np.nan, (json.dumps(value[1:-1]),))
    if value:  # which may itself be the JSON of a number, of true, false or null
        return Condition(text, column, "=", _number(value), (json.dumps(value), value))
    if np.isnan(_number(bound)):
        raise ConfigError(
            f'data.filter.where: {text!r} must be like "aesthetic>=5", with one of >=, <=, >, <, or like "license=CC0".'
        )
    return Condition(text, column, sign, _number(bound), ())


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return np.nan


def _meets(condition: Condition, found: Mapping[str, np.ndarray]) -> np.ndarray:
    """Whether each example meets a condition, bool [N]; nan compares as false."""
    meets = COMPARE[condition.sign](found[f"number:{condition.column}"], condition.bound)
    if condition.sign != "=":
        return meets
    return meets | np.isin(found[f"column:{condition.column}"], [_hash(v) for v in condition.values])


def _commonest(values: np.ndarray, names: np.ndarray, kept: np.ndarray, most: int) -> np.ndarray:
    """Whether each value is among the `most` commonest of those kept, bool [N]; ties go by name.

    Args:
        values: uint64 [N], hashes of the values.
        names: bytes [N], their beginnings.
        kept: bool [N].
    """
    unique, first, counts = np.unique(values[kept], return_index=True, return_counts=True)
    return np.isin(values, unique[np.lexsort((unique, names[kept][first], -counts))[:most]])
