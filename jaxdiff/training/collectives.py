"""The communication of a compiled program between devices, read from its HLO text."""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128}

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*)?\{$")
_KIND = re.compile(r"= (.*?) (" + "|".join(KINDS) + r")(-start)?\(")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:body|condition|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\s*\{"n":\s*"?(\d+)')
# The three notations of device groups.
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}")
_LIST = re.compile(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]*)\}")


class Collective(NamedTuple):
    """All collectives of one kind over the same axes of the mesh."""

    kind: str  # one of KINDS
    axes: tuple[str, ...]  # of the mesh, along which devices communicate
    devices: int  # that take part in each
    arrays: int  # sent in one run of the program
    size: int  # bytes of these arrays, of inputs or outputs, whichever are larger: all-gather counts as reduce-scatter

    @property
    def sent(self) -> float:
        """Bytes that each device sends, by the ring algorithms (Patarasuk & Yuan 2009)."""
        n = self.devices
        return self.size * {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0}.get(self.kind, (n - 1) / n)


def collectives(text: str, mesh: Mapping[str, int]) -> list[Collective]:
    """The collectives of one run of a compiled program, those in loops counted once for each iteration.

    Args:
        text: of `jax.jit(f).lower(…).compile().as_text()`.
        mesh: sizes of its axes in their order, as `Mesh.shape`.

    Returns:
        One entry for each kind and set of axes, the most bytes first.
    """
    bodies, entry = _computations(text)
    totals: dict[tuple[str, tuple[str, ...]], list[int]] = {}

    def visit(name: str, runs: int) -> None:
        for line in bodies.get(name, ()):
            if match := _KIND.search(line):
                axes = _axes(line, mesh)
                if not axes:
                    continue  # each device is a group by itself
                shapes, kind, is_async = match.groups()
                sizes = [_bytes(*a) for a in _ARRAY.findall(shapes)]
                if is_async and kind != "all-reduce":
                    sizes = sizes[len(sizes) // 2 :]  # (operands, results)
                size = sum(sizes)
                if kind == "reduce-scatter":
                    size *= math.prod(mesh[a] for a in axes)
                total = totals.setdefault((kind, axes), [0, 0])
                total[0] += runs * len(sizes)
                total[1] += runs * size
                continue  # its callee is the reduction
            trip_count = int(m[1]) if " while(" in line and (m := _TRIPS.search(line)) else 1
            branches = [n.strip(" %") for m in _BRANCHES.findall(line) for n in m.split(",")]
            for callee in [*_CALLED.findall(line), *branches]:
                visit(callee, runs * trip_count)

    visit(entry, 1)
    result = [Collective(k, a, math.prod(mesh[x] for x in a), *total) for (k, a), total in totals.items()]
    return sorted(result, key=lambda collective: -collective.size)


def collectives_table(rows: list[Collective]) -> str:
    """`collectives` as a Markdown table."""
    lines = [
        "| collective | over | devices | arrays | MB a step | MB sent by each device |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r.kind} | {', '.join(r.axes)} | {r.devices} | {r.arrays} | {r.size / 1e6:,.1f} | {r.sent / 1e6:,.1f} |"
        for r in rows
    ]
    return "\n".join(lines)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """(lines of each computation by its name, name of the entry computation)."""
    bodies: dict[str, list[str]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if match := _HEADER.match(line):
            current = bodies.setdefault(match[2], [])
            entry = match[2] if match[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None:
            current.append(line)
    return bodies, entry


def _bytes(dtype: str, shape: str) -> int:
    bits = BITS.get(dtype) or int(re.sub(r"\D", "", dtype) or 8)  # s32, u8, …
    return math.prod(int(n) for n in shape.split(",") if n) * bits // 8


def _axes(line: str, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The axes of the mesh along which the devices of the first group differ."""
    coordinates = np.asarray(np.unravel_index(_group(line, math.prod(mesh.values())), tuple(mesh.values())))
    return tuple(axis for axis, coordinate in zip(mesh, coordinates, strict=True) if len(set(coordinate.tolist())) > 1)


def _group(line: str, devices: int) -> np.ndarray:
    """The devices of a collective's first group, in any of HLO's three notations."""
    if match := _IOTA.search(line):
        groups, dims, order = match.groups()
        return _device_grid(dims, order).reshape(_numbers(groups))[0].ravel()
    if match := _MESH.search(line):
        mesh_text, dims, order, axes = match.groups()
        axis_sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh_text))
        ids = (_device_grid(dims, order) if dims else np.arange(devices)).reshape([int(n) for n in axis_sizes.values()])
        shape: list[int] = []
        index: list[slice | int] = []
        for name, size in axis_sizes.items():
            part = re.search(rf"'{name}'(?::\((\d+)\)(\d+))?", axes)
            # 'axis':(m)n is the part of n devices that comes after m of the axis.
            before, middle = (int(part[1]), int(part[2])) if part and part[1] else (1, int(size) if part else 1)
            shape += [before, middle, int(size) // (before * middle)]
            index += [0, slice(None), 0]
        return ids.reshape(shape)[tuple(index)].ravel()
    if (match := _LIST.search(line)) and match[1]:
        return np.asarray(_numbers(match[1]))
    return np.arange(devices)  # without groups: all devices


def _device_grid(dims: str, order: str | None) -> np.ndarray:
    shape = _numbers(dims)
    return np.arange(math.prod(shape)).reshape(shape).transpose(_numbers(order) if order else None)


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",") if n]
