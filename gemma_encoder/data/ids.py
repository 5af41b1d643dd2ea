"""Ids of texts, in compact arrays: from an id to its number and back. Ids that simply count, as MS MARCO's pids do, take no room at all.

N ids in all, n asked for at a time.
"""

import pathlib
from collections.abc import Mapping

import numpy as np

from gemma_encoder.data import cache
from gemma_encoder.data.lines import Spans
from gemma_encoder.inputs.errors import InputError


class IdWriter:
    """Takes the ids of a file in its order and writes the arrays that `Ids` reads.

    Args:
        place: the folder that the arrays go to.
        path: the file that the ids come from, one per line.
        what: what the file calls them, e.g. "pid".
    """

    def __init__(self, place: pathlib.Path, path: pathlib.Path, what: str):
        self._place, self._path, self._what = place, path, what
        self._count, self._bytes, self._first = 0, 0, 0
        self._counting = True
        self._hashes: list[np.ndarray] = []
        for name, dtype in (("id_bytes", np.uint8), ("id_ends", np.int64)):
            cache.save_array(place, name, np.zeros(0, dtype))

    def add(self, ids: Spans) -> None:
        """The ids of the next lines."""
        values, canonical = _canonical(ids)
        if not self._count and len(values):
            self._first = int(values[0])
        expected = self._first + np.arange(self._count, self._count + len(values))
        self._counting &= bool(np.all(canonical & (values == expected)))
        self._hashes.append(ids.hashes())
        cache.save_array(self._place, "id_bytes", ids.joined())
        cache.save_array(self._place, "id_ends", self._bytes + np.cumsum(ids.ends - ids.starts))
        self._count += len(values)
        self._bytes += int((ids.ends - ids.starts).sum())

    def finish(self) -> None:
        """Completes the arrays; raises InputError for an id that came twice."""
        if self._counting:
            for path in self._place.glob("id_*"):
                path.unlink()
            cache.save_array(
                self._place, "id_range", np.array([self._first, self._count], np.int64)
            )
            return
        hashes = np.concatenate(self._hashes)
        self._hashes = []
        order = np.argsort(hashes, kind="stable").astype(np.int32)
        hashes = hashes[order]
        cache.save_array(self._place, "id_hashes", hashes)
        cache.save_array(self._place, "id_order", order)
        longest_run = 1
        while len(hashes) > longest_run and np.any(hashes[longest_run:] == hashes[:-longest_run]):
            longest_run += 1
        cache.save_array(self._place, "id_longest_run", np.array([longest_run]))
        ids = Ids(cache.load_arrays(self._place))
        again: list[int] = []
        for distance in range(1, longest_run):
            equal = np.flatnonzero(hashes[distance:] == hashes[:-distance])
            same = ids.spans(order[equal]).equal(ids.spans(order[equal + distance]))
            again += order[equal + distance][same].tolist()
        if again:
            number = min(again)
            raise InputError(
                f"{self._path}:{number + 1}: {self._what} {ids[number]!r} appears a second time"
            )


class Ids:
    """Numbers 0 … N − 1 by id, and ids by number.

    Args:
        arrays: as `IdWriter` wrote them.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        self._first, self._count = (
            map(int, arrays["id_range"]) if "id_range" in arrays else (0, len(arrays["id_ends"]))
        )
        self._sorted = (
            None
            if "id_range" in arrays
            else (arrays["id_hashes"], arrays["id_order"], arrays["id_bytes"], arrays["id_ends"])
        )
        self._longest_run = (
            int(arrays["id_longest_run"][0]) if "id_longest_run" in arrays else 1
        )  # of ids that share a hash

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> str:
        return (
            str(self._first + int(number))
            if self._sorted is None
            else self.spans(np.array([number])).text(0)
        )

    def spans(self, numbers: np.ndarray) -> Spans:
        """The ids of numbers, where they are stored."""
        _, _, content, ends = self._sorted
        return Spans(content, np.where(numbers > 0, ends[numbers - 1], 0), ends[numbers])

    def find(self, ids: Spans) -> np.ndarray:
        """[n] int32: the number of each id, -1 where there is none."""
        if self._sorted is None:
            values, canonical = _canonical(ids)
            return np.where(
                canonical & (values >= self._first) & (values < self._first + self._count),
                values - self._first,
                -1,
            ).astype(np.int32)
        stored, order, _, _ = self._sorted
        hashes = ids.hashes()
        result = np.full(len(hashes), -1, np.int32)
        places = np.searchsorted(stored, hashes)
        for distance in range(self._longest_run):
            inside = np.flatnonzero((result < 0) & (places + distance < len(stored)))
            inside = inside[stored[places[inside] + distance] == hashes[inside]]
            numbers = order[places[inside] + distance]
            same = Spans(ids.data, ids.starts[inside], ids.ends[inside]).equal(self.spans(numbers))
            result[inside[same]] = numbers[same]
        return result

    def number(self, name: str) -> int:
        """The number of one id, -1 where there is none."""
        return int(self.find(Spans.of([name.encode()]))[0])


def _canonical(ids: Spans) -> tuple[np.ndarray, np.ndarray]:
    """Values of ids that are written as Python writes a whole number from 0, and which ones are."""
    values, valid = ids.integers()
    first = ids.first()
    return values, valid & (first != ord("-")) & (
        (first != ord("0")) | (ids.ends - ids.starts == 1)
    )
