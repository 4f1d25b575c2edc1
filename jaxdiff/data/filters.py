"""Filters of examples by metadata, size, caption length, scores and similarity to others.

One pass over the data collects what the filters need, in parts that hosts divide and that are cached.
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
KNOWN_FILTERS = (
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
NAME_BYTES = 64  # stored bytes of a column's value, to order equally common values
LAYOUT = 3  # version of a scan's layout on disk


class Condition(NamedTuple):
    """A condition of `where`."""

    text: str
    column: str
    sign: str  # a key of COMPARE
    bound: float  # nan if it is not a number
    values: tuple[str, ...]  # JSON of the values that "=" allows


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
    """The properties of examples that filters read, as arrays [N].

    Args:
        sizes: adds "width" and "height" in pixels, upright, from metadata of those names if any, otherwise from the
            image's header. 0 for an unreadable image.
        columns: adds metadata as "column:<name>" uint64, a hash of the value's JSON, which differs for 1, "1" and no
            value; and "number:<name>" float64, nan for what is not a number.
        names: columns of which "name:<name>" holds the first NAME_BYTES of the JSON. Values may be long; nothing else
            of them is kept.
        hashes: "exact" or "near" adds "hash" uint64, of the file or of the image's content, and "hashed" bool, whether
            it could be read. If not, the hash is invalid: every number is a possible hash.
        cache: folder for the results; hosts that share it divide the work.

    Returns:
        These arrays, and "caption" int32: characters of the shortest caption.
    """
    scan_key = json.dumps([LAYOUT, source.digest, sizes, list(columns), list(names), hashes, PART])
    starts = range(0, len(source), PART)

    def scan_index(index: int) -> dict[str, Any]:
        return _scan_example(source, index, sizes, columns, names, hashes)

    def scan_part(part: int) -> dict[str, np.ndarray]:
        start = starts[part]
        with ThreadPoolExecutor(threads) as pool:
            rows = list(pool.map(scan_index, range(start, min(start + PART, len(source)))))
        return {name: np.asarray([row[name] for row in rows]) for name in rows[0]}

    if cache is None:
        parts: list[Mapping[str, np.ndarray]] = [scan_part(i) for i in range(len(starts))]
    else:
        folder = cache / f"scan-{hashlib.sha256(scan_key.encode()).hexdigest()[:16]}"
        part_names = [f"{i:06d}" for i in range(len(starts))]
        store.fill(folder, part_names, scan_part, host_index=host_index, host_count=host_count)
        parts = [store.read_part(folder / file) for file in part_names]
    return {name: np.concatenate([arrays[name] for arrays in parts]) for name in parts[0]}


def _scan_example(
    source: Source, index: int, sizes: bool, columns: Sequence[str], names: Sequence[str], hashes: str
) -> dict[str, Any]:
    row: dict[str, Any] = {"caption": np.int32(0), **_values({}, columns, names)}
    row |= {"width": np.int32(0), "height": np.int32(0)} if sizes else {}
    row |= {"hash": np.uint64(0), "hashed": np.bool_(False)} if hashes else {}
    try:
        record = source.read(index, image=bool(hashes))
        row["caption"] = np.int32(min(map(len, record.captions)))
        row |= _values(record.extras, columns, names)
        size: Any = record.extras.get("width"), record.extras.get("height")
        size_known = all(isinstance(n, int) and 0 < n < 2**31 for n in size)
        if (sizes and not size_known) or hashes:
            image = (record if hashes else source.read(index)).image
            data = image if isinstance(image, bytes) else Path(image).read_bytes()
            if sizes and not size_known:
                size = _size(data)
            if hashes:
                hash_value = content_hash(data) if hashes == "exact" else dhash(open_image(data, 9))
                row |= {"hash": np.uint64(hash_value), "hashed": np.bool_(True)}
        if sizes:
            row |= {"width": np.int32(size[0]), "height": np.int32(size[1])}
    except Exception as e:  # damaged in any way; training reports it when it reads it
        logging.log_first_n(logging.WARNING, "Example %d of %s cannot be read: %s", 10, index, source.name, e)
    return row


def _values(extras: Mapping[str, Any], columns: Sequence[str], names: Sequence[str]) -> dict[str, Any]:
    """The metadata of an example that a scan stores."""
    json_values = {name: json.dumps(extras.get(name), default=str) for name in (*columns, *names)}
    numbers = {c: float(v) if isinstance(v := extras.get(c), int | float) else np.nan for c in columns}
    return {
        **{f"column:{c}": _hash(json_values[c]) for c in columns},
        **{f"number:{c}": numbers[c] for c in columns},
        **{f"name:{c}": json_values[c].encode()[:NAME_BYTES] for c in names},
    }


def _hash(text: str) -> np.uint64:
    return np.uint64(content_hash(text.encode()))


def _size(data: bytes) -> tuple[int, int]:
    """Width and height of an encoded image, upright."""
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        # For EXIF data, which PNG files hardly ever have, Pillow would decode the whole PNG.
        is_rotated = image.format != "PNG" and image.getexif().get(0x0112, 1) >= 5
        return (image.height, image.width) if is_rotated else (image.width, image.height)


def select(
    source: Source, filters: Mapping[str, Any], *, cache: Path | None = None, host_index: int = 0, host_count: int = 1,
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
            duplicates: "exact" keeps the first of equal files, "near" the first of images whose 64-bit hashes of their
                content differ in at most `duplicate_bits` bits; "": off.
            max_subjects: keeps the examples of the most common values of the column "subject", this many; 0: all.
            any other name: allowed values of the column of that name; () allows all.

    Raises:
        ConfigError: a filter has an invalid value, or no example is left.
    """
    conditions = [_parse_condition(text) for text in filters.get("where", ())]
    if (kind := filters.get("duplicates", "")) not in ("", "exact", "near"):
        raise ConfigError(f'data.filter.duplicates must be "exact", "near" or "", not {kind!r}.')
    if not 0 <= (bits := filters.get("duplicate_bits", 4)) <= 16:
        raise ConfigError(f"data.filter.duplicate_bits must be from 0 to 16, not {bits}.")
    allowed = {k: tuple(v) for k, v in filters.items() if k not in KNOWN_FILTERS and v}
    sizes = bool(filters.get("min_side") or filters.get("max_aspect"))
    names = ["subject"] if filters.get("max_subjects") else []
    columns = sorted({*allowed, *(condition.column for condition in conditions), *names})
    if not (columns or sizes or kind or filters.get("min_caption") or filters.get("max_caption")):
        return source
    hosts: Any = {"cache": cache, "host_index": host_index, "host_count": host_count, "threads": threads}
    scanned = scan(source, sizes=sizes, columns=columns, names=names, hashes=kind, **hosts)
    keep = np.ones(len(source), bool)
    dropped: dict[str, int] = {}
    for reason, drop in _drops(scanned, filters, allowed, conditions, keep):
        if count := int((drop & keep).sum()):
            dropped[reason] = count
        keep &= ~drop
    reasons = ", ".join(f"{name} {count}" for name, count in dropped.items())
    if not keep.any():
        raise ConfigError(
            f"data.filter leaves no image of the {len(source)} of {source.name}; it drops {reasons}: allow more."
        )
    if keep.all():
        return source
    logging.info("%d of %d images of %s pass the filters; dropped: %s.", keep.sum(), len(keep), source.name, reasons)
    return Subset(source, np.flatnonzero(keep))


def _drops(
    scanned: Mapping[str, np.ndarray],
    filters: Mapping[str, Any],
    allowed: Mapping[str, tuple[Any, ...]],
    conditions: Sequence[Condition],
    keep: np.ndarray,
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (name of a filter, whether it drops each example, bool [N]) for every filter in turn.

    Args:
        scanned: result of `scan`.
        filters: see `select`.
        allowed: allowed values by column.
        conditions: of `where`.
        keep: bool [N], the examples that passed the previous filters; the caller updates it.
    """
    for name, values in allowed.items():
        yield name, ~np.isin(scanned[f"column:{name}"], [_hash(json.dumps(v)) for v in values])
    for condition in conditions:
        yield condition.text, ~_satisfies(condition, scanned)
    if "width" in scanned:
        shorter, longer = (f(scanned["width"], scanned["height"]) for f in (np.minimum, np.maximum))
        yield "unreadable", shorter == 0
        yield "min_side", shorter < filters.get("min_side", 0)
        yield "max_aspect", longer > (filters.get("max_aspect") or np.inf) * np.maximum(shorter, 1)
    yield "min_caption", scanned["caption"] < filters.get("min_caption", 0)
    yield "max_caption", scanned["caption"] > (filters.get("max_caption") or np.inf)
    if kind := filters.get("duplicates"):
        candidates = np.flatnonzero(keep & scanned["hashed"])
        bits = filters.get("duplicate_bits", 4) if kind == "near" else 0
        duplicates = np.zeros(len(keep), bool)
        duplicates[candidates] = near_duplicates(scanned["hash"][candidates], bits)
        yield "duplicates", duplicates
    if max_subjects := int(filters.get("max_subjects", 0)):
        yield "max_subjects", ~_most_common(scanned["column:subject"], scanned["name:subject"], keep, max_subjects)


def _parse_condition(text: str) -> Condition:
    text = str(text).strip()
    match = CONDITION.fullmatch(text)
    column, operator, number, value = match.groups() if match else ("", "", "", "")
    if value and QUOTED.fullmatch(value):
        return Condition(text, column, "=", np.nan, (json.dumps(value[1:-1]),))
    if value:  # text, or the JSON of a number, true, false or null
        return Condition(text, column, "=", _number(value), (json.dumps(value), value))
    if np.isnan(_number(number)):
        raise ConfigError(
            f'data.filter.where: {text!r} must be like "aesthetic>=5", with one of >=, <=, >, <, or like "license=CC0".'
        )
    return Condition(text, column, operator, _number(number), ())


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return np.nan


def _satisfies(condition: Condition, scanned: Mapping[str, np.ndarray]) -> np.ndarray:
    """Whether each example meets a condition, bool [N]; nan compares as false."""
    satisfied = COMPARE[condition.sign](scanned[f"number:{condition.column}"], condition.bound)
    if condition.sign != "=":
        return satisfied
    return satisfied | np.isin(scanned[f"column:{condition.column}"], [_hash(v) for v in condition.values])


def _most_common(values: np.ndarray, names: np.ndarray, keep: np.ndarray, count: int) -> np.ndarray:
    """Whether each value is among the `count` most common of those to keep, bool [N]; ties go by name.

    Args:
        values: uint64 [N], hashes of the values.
        names: bytes [N], prefixes of the values.
        keep: bool [N].
    """
    unique, first, counts = np.unique(values[keep], return_index=True, return_counts=True)
    return np.isin(values, unique[np.lexsort((unique, names[keep][first], -counts))[:count]])
