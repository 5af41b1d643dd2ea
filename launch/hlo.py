"""Reads the collectives of a compiled program from its HLO text, with their loop trip counts."""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterable
from typing import NamedTuple

# On TPUs, a reduce-scatter is a computation of this name that keeps a part of an all-reduce.
SCATTERED = "all-reduce-scatter"
COLLECTIVE_KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
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
_CHANNEL = re.compile(r"channel_id=(\d+)")
_CONDITION = re.compile(r"condition=%?([\w.-]+)")
_CALLEE = re.compile(r"(?:calls|to_apply|body|called_computation|async_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective operation.

    Attributes:
        kind: one of COLLECTIVE_KINDS.
        shape: dtype and shape of its largest output, e.g. "bf16[2304,9216]".
        size: bytes of its outputs on one chip.
        group: number of chips that participate together.
        times: number of executions per step.
    """

    kind: str
    shape: str
    size: int
    group: int
    times: int

    @property
    def traffic(self) -> float:
        """Bytes that a chip sends per step with the ring algorithms."""
        share = (self.group - 1) / self.group
        sent_per_byte = {
            "all-gather": share,
            "all-reduce": 2 * share,
            "reduce-scatter": self.group - 1,
            "all-to-all": share,
            "collective-permute": 1,
        }
        return sent_per_byte[self.kind] * self.size * self.times


class _Instruction(NamedTuple):
    """An HLO instruction: `name = type operation(operands), attributes`."""

    name: str
    type: str
    operation: str
    arguments: str  # operands and attributes: the remainder of the line


_Computations = dict[str, list[_Instruction]]


def array_sizes(text: str) -> list[tuple[int, str]]:
    """Returns (bytes, shape) of every array in an HLO type."""
    sizes = []
    for dtype, dimensions in _SHAPE.findall(text):
        if dtype in _BYTES:
            elements = math.prod(int(size) for size in dimensions.split(",") if size)
            sizes.append((_BYTES[dtype] * elements, f"{dtype}[{dimensions}]"))
    return sizes


def collectives(text: str, devices: int) -> list[Collective]:
    """Returns every collective of a program with its trip count, the largest traffic first.

    The compiler may split one collective into parts to overlap it with compute. The parts share a
    channel and count once.

    Args:
        text: `compiled.as_text()`.
        devices: size of the mesh: the group of a collective that lists no replica groups.
    """
    computations, entry = _parse_computations(text)

    @functools.cache
    def by_channel(name: str) -> dict[str, Collective]:
        """Returns the collectives of a computation and of all that it calls, by channel."""
        channels: dict[str, Collective] = {}

        def add(channel: str, collective: Collective) -> None:
            if channel not in channels or channels[channel].times < collective.times:
                channels[channel] = collective

        for instruction in computations.get(name, ()):
            if instruction.operation.removesuffix("-start") in COLLECTIVE_KINDS:
                add(_channel(name, instruction), _collective(name, instruction, devices))
            trips = _trip_count(instruction, computations)
            for callee in _CALLEE.findall(instruction.arguments):
                for channel, collective in by_channel(callee).items():
                    times = collective.times * trips
                    add(channel, dataclasses.replace(collective, times=times))
            for branches in _BRANCHES.findall(instruction.arguments):
                branch_names = [branch.strip(" %") for branch in branches.split(",")]
                most_expensive = max(map(by_channel, branch_names), key=_total_traffic)
                for channel, collective in most_expensive.items():
                    add(channel, collective)
        return channels

    executions: collections.Counter = collections.Counter()
    for collective in by_channel(entry).values():
        executions[dataclasses.replace(collective, times=1)] += collective.times
    merged = [dataclasses.replace(single, times=total) for single, total in executions.items()]
    return sorted(merged, key=lambda collective: -collective.traffic)


def _total_traffic(channels: dict[str, Collective]) -> float:
    return sum(collective.traffic for collective in channels.values())


def _channel(computation: str, instruction: _Instruction) -> str:
    """Returns the key under which parts of one collective are merged."""
    # Reductions that are scattered immediately all have the same channel and are never split.
    if not computation.startswith(SCATTERED):
        channel = _CHANNEL.search(instruction.arguments)
        if channel:
            return channel[1]
    return f"{computation}/{instruction.name}"


def _trip_count(instruction: _Instruction, computations: _Computations) -> int:
    """Returns the trip count of a while loop, 1 for anything else.

    A scan counts up to a constant, which is in the loop's condition.
    """
    trips = 1
    for condition in _CONDITION.findall(instruction.arguments):
        bounds = _integer_constants(computations.get(condition, ()))
        trips = max(bounds, default=1)
    return trips


def _integer_constants(instructions: Iterable[_Instruction]) -> list[int]:
    constants = [
        instruction.arguments.partition(")")[0]
        for instruction in instructions
        if instruction.operation == "constant"
    ]
    return [int(value) for value in constants if value.isdigit()]


def _collective(computation: str, instruction: _Instruction, devices: int) -> Collective:
    kind = instruction.operation.removesuffix("-start")
    group = _group_size(instruction.arguments, devices)
    outputs = array_sizes(instruction.type)
    is_started_tuple = instruction.operation.endswith("-start") and instruction.type.startswith("(")
    if is_started_tuple and len(outputs) > 1:
        # The type of an asynchronous start lists its operands first, then its outputs.
        outputs = outputs[len(outputs) // 2 :]
    size = sum(size for size, _ in outputs)
    if kind == "all-reduce" and computation.startswith(SCATTERED):
        kind = "reduce-scatter"
        size //= group
    _, largest_shape = max(outputs)
    return Collective(kind, largest_shape, size, group, 1)


def _parse_computations(text: str) -> tuple[_Computations, str]:
    """Returns the instructions of each computation, and the name of the entry computation."""
    computations: _Computations = {}
    entry = current = ""
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            current = header[2]
            computations[current] = []
            entry = current if header[1] else entry
        elif instruction := _INSTRUCTION.match(line):
            computations.setdefault(current, []).append(_Instruction(*instruction.groups()))
    return computations, entry


def _group_size(arguments: str, devices: int) -> int:
    """Returns the group size from a list of groups, from [groups,size], or from mesh axes."""
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]", arguments):
        return int(iota[2])
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", arguments):
        return listed[1].count(",") + 1
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", arguments):
        axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        return math.prod(axes[name] for name in re.findall(r"'(\w+)'", mesh[2]))
    return devices
