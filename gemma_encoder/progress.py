"""Progress of work on many texts: a bar on a terminal, elsewhere a line after each silence."""

import contextlib
from collections.abc import Callable, Iterator

import tqdm

from gemma_encoder import activity
from gemma_encoder.text_encoder import PROGRESS_DELAY


@contextlib.contextmanager
def progress(
    title: str,
    done: int,
    unit: str = "texts",
    total: int | None = None,
    shows: bool | None = None,
) -> Iterator[Callable[[int], object]]:
    """Yields a function to call with numbers of texts: of a progress bar, else of an activity.

    Args:
        title: names the work.
        done: number of texts before the first call.
        unit: what is counted.
        total: number of all texts, if it is clear.
        shows: show a bar; by default on a terminal and in a notebook.
    """
    if activity.shows_bars() if shows is None else shows:
        with tqdm.tqdm(
            desc=title,
            total=total,
            initial=done,
            unit=f" {unit}",
            delay=PROGRESS_DELAY,
            dynamic_ncols=True,
        ) as bar:
            yield bar.update
        return

    def advance(count: int) -> None:
        nonlocal done
        done += count

    of_total = f" of {total:,}" if total else ""
    with activity.during(lambda: f"{title}, {done:,}{of_total} {unit} done"):
        yield advance
