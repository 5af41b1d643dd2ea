"""What a compiled program does between chips, read off its text: collectives by kind, each as often as it runs."""

import collections
import dataclasses
import functools
import math
import re

SCATTERED = "all-reduce-scatter"  # the computations in which each chip keeps a part of a sum: how TPUs write a reduce-scatter
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "s16": 2,
    "u16": 2,
    "bf16": 2,
    "f16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
    "s64": 8,
    "u64": 8,
    "f64": 8,
}
_SHAPE = re.compile(r"\b([a-z]+[0-9]*)\[([0-9,]*)\]")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.+?) ([a-z][\w-]*)\((.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) .*\{$")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation.

    Attributes:
        kind: one of KINDS.
        shape: of the largest array that it makes, e.g. "bf16[2304,9216]".
        size: bytes of all that it makes, on one chip.
        group: chips that take part in it together.
        times: how often a step runs it.
    """

    kind: str
    shape: str
    size: int
    group: int
    times: int

    @property
    def traffic(self) -> float:
        """Bytes that a chip sends in a step, by the ring algorithms."""
        share = (self.group - 1) / self.group
        whole = {
            "all-gather": share,
            "all-reduce": 2 * share,
            "reduce-scatter": self.group - 1,
            "all-to-all": share,
            "collective-permute": 1,
        }
        return whole[self.kind] * self.size * self.times


def array_sizes(text: str) -> list[tuple[int, str]]:
    """(bytes, shape) of every array named in a type."""
    found = []
    for dtype, dimensions in _SHAPE.findall(text):
        if dtype in _BYTES:
            found.append(
                (
                    _BYTES[dtype] * math.prod(int(d) for d in dimensions.split(",") if d),
                    f"{dtype}[{dimensions}]",
                )
            )
    return found


def collectives(text: str, devices: int) -> list[Collective]:
    """Every collective of a program, loops taken as often as they run, the largest traffic first.

    The parts into which the compiler cuts one collective, to overlap it with other work, share its channel and count once.

    Args:
        text: `compiled.as_text()`.
        devices: of the mesh: what takes part in a collective that names no groups.
    """
    computations, entry = _computations(text)

    @functools.cache
    def within(name: str) -> dict[str, Collective]:
        """By channel."""
        found: dict[str, Collective] = {}

        def add(channel: str, one: Collective) -> None:
            if channel not in found or found[channel].times < one.times:
                found[channel] = one

        for label, made, operation, rest in computations.get(name, ()):
            if operation.removesuffix("-start") in KINDS:
                # Reductions that are scattered at once all have the same channel, and are never cut.
                channel = (
                    None if name.startswith(SCATTERED) else re.search(r"channel_id=(\d+)", rest)
                )
                add(
                    channel[1] if channel else f"{name}/{label}",
                    _collective(name, made, operation, rest, devices),
                )
            trips = 1
            for loop in re.findall(r"condition=%?([\w.-]+)", rest):
                inside = [
                    rest.partition(")")[0]
                    for _, _, kind, rest in computations.get(loop, ())
                    if kind == "constant"
                ]
                bounds = [int(value) for value in inside if value.isdigit()]
                trips = max(bounds, default=1)  # a scan counts up to a constant
            for inner in re.findall(
                r"(?:calls|to_apply|body|called_computation|async_computation)=%?([\w.-]+)", rest
            ):
                for channel, one in within(inner).items():
                    add(channel, dataclasses.replace(one, times=one.times * trips))
            for branches in re.findall(r"branch_computations=\{([^}]*)\}", rest):
                costliest = max(
                    (within(branch.strip(" %")) for branch in branches.split(",")),
                    key=lambda part: sum(one.traffic for one in part.values()),
                )
                for channel, one in costliest.items():
                    add(channel, one)
        return found

    counted: collections.Counter = collections.Counter()
    for one in within(entry).values():
        counted[dataclasses.replace(one, times=1)] += one.times
    return sorted(
        (dataclasses.replace(one, times=times) for one, times in counted.items()),
        key=lambda one: -one.traffic,
    )


def _collective(computation: str, made: str, operation: str, rest: str, devices: int) -> Collective:
    kind, group = operation.removesuffix("-start"), _group(rest, devices)
    parts = array_sizes(made)
    # A started operation's type also holds what it was given; what it makes stands behind.
    parts = (
        parts[len(parts) // 2 :]
        if operation.endswith("-start") and made.startswith("(") and len(parts) > 1
        else parts
    )
    size = sum(size for size, _ in parts)
    if kind == "all-reduce" and computation.startswith(SCATTERED):
        kind, size = "reduce-scatter", size // group
    return Collective(kind, max(parts)[1], size, group, 1)


def _computations(text: str) -> tuple[dict[str, list[tuple[str, str, str, str]]], str]:
    """The instructions of each computation as (name, type, operation, rest of the line), and the entry's name."""
    found: dict[str, list[tuple[str, str, str, str]]] = {}
    entry = current = ""
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            current = header[2]
            found[current] = []
            entry = current if header[1] else entry
        elif instruction := _INSTRUCTION.match(line):
            found.setdefault(current, []).append(instruction.groups())
    return found, entry


def _group(rest: str, devices: int) -> int:
    """How many chips work together: groups are written as a list, as [groups,size], or as axes of a mesh."""
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]", rest):
        return int(iota[2])
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return listed[1].count(",") + 1
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest):
        axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        return math.prod(axes[name] for name in re.findall(r"'(\w+)'", mesh[2]))
    return devices
