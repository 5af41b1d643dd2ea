"""Metrics and progress of a run: `metrics.jsonl`, TensorBoard, and a progress bar or lines."""

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

import tqdm
from etils import epath

from gemma_encoder import activity, distributed, terminal
from gemma_encoder.inputs.errors import in_one_line
from gemma_encoder.inputs.json_text import from_json, to_json
from gemma_encoder.inputs.untrusted import printable
from gemma_encoder.training.event_file import EventFile
from gemma_encoder.whole_files import naming, write_whole


class MetricsLog:
    """`metrics.jsonl` and TensorBoard files of a workdir; only the main process writes.

    Args:
        workdir: the run's workdir.
        step: the restored step. Lines of later steps, left by a run that was killed after its
            last checkpoint, are dropped, and so is a truncated line.

    Attributes:
        latest: the newest line of each task and split; empty except on the main process.
    """

    def __init__(self, workdir: epath.Path, step: int):
        self.path = workdir / "metrics.jsonl"
        self._workdir = workdir
        self._writer = None
        self.latest: dict[tuple[str, str], dict[str, Any]] = {}
        if not distributed.is_main_process():
            return
        with in_one_line(f"{workdir} cannot be written", errors=OSError):
            self._replace([line for line in read_metrics(workdir) if line["step"] <= step])
            self._writer = EventFile(workdir / "tensorboard")

    def write(
        self, step: int, split: str, values: Mapping[str, float], task: str | None = None
    ) -> None:
        """Appends a line of values, of one task or, without `task`, of the whole run."""
        if self._writer is None:
            return
        line: dict[str, Any] = {"step": step, "split": split}
        if task:
            line["task"] = task
        line |= values
        with naming(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(to_json(line) + "\n")
        self._remember(line)
        prefix = f"{split}/{task}/" if task else f"{split}/"
        with naming(self._workdir / "tensorboard"):
            self._writer.write(step, {prefix + name: value for name, value in values.items()})

    def has_evaluation(self, step: int, split: str, tasks: Set[str]) -> bool:
        """Returns True if there is a line of each task; drops the lines if there are only some.

        Only for the main process.
        """
        others = []
        evaluated = set()
        for line in read_metrics(self._workdir):
            if "task" in line and (line["step"], line["split"]) == (step, split):
                evaluated.add(line["task"])
            else:
                others.append(line)
        if tasks <= evaluated:
            return True
        if evaluated:
            self._replace(others)
        return False

    def _replace(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Replaces all lines."""
        self.latest.clear()
        for line in lines:
            self._remember(line)
        write_whole(self.path, "".join(to_json(line) + "\n" for line in lines))

    def _remember(self, line: dict[str, Any]) -> None:
        if "task" in line:
            self.latest[line["task"], line["split"]] = line

    def close(self) -> None:
        """Closes the TensorBoard file."""
        if self._writer is not None:
            self._writer.close()


FORMER_KEYS = {"model_flop_utilisation": "model_flop_utilization"}  # in logs of earlier versions


def read_metrics(workdir: epath.PathLike) -> list[dict[str, Any]]:
    """Reads the lines of a workdir's `metrics.jsonl`; truncated and damaged lines are skipped.

    An undefined metric, which JSON stores as null, is NaN.

    Raises:
        InputError: the file cannot be read at all.
    """
    path = epath.Path(workdir) / "metrics.jsonl"
    with in_one_line(f"{path} cannot be read", "move it away", OSError):
        content = path.read_bytes() if path.exists() else b""
    lines = []
    for encoded in content.split(b"\n"):
        try:
            line = from_json(encoded)
        except ValueError:  # invalid UTF-8, too
            continue
        if _is_log_line(line):
            lines.append(
                {
                    FORMER_KEYS.get(key, key): math.nan if value is None else value
                    for key, value in line.items()
                }
            )
    return lines


def _is_log_line(line: Any) -> bool:
    """Returns True for an object with a step and a split, the task a name if there is one."""
    return (
        isinstance(line, dict)
        and type(line.get("step")) is int
        and isinstance(line.get("split"), str)
        and isinstance(line.get("task", ""), str)
    )


class Progress:
    """Progress bar on a terminal or in a notebook, plain lines elsewhere.

    Only the main process prints. The time left is that of the remaining steps, evaluations and
    checkpoints, at the pace so far; the time of compiling does not count.

    Args:
        total: steps of the run.
        done: steps taken before this start.
        clock: returns seconds.
    """

    def __init__(self, total: int, done: int, clock: Callable[[], float] = time.monotonic):
        self._total = total
        self._step = done
        self._start_step = done
        self._clock = clock
        self._start_time = clock()
        self._compiled = activity.compile_seconds()  # before the start
        self._quiet = not distributed.is_main_process()
        self._bar = None
        if reporter := activity.current():
            reporter.announces = True
        if not self._quiet and activity.shows_bars():
            self._bar = tqdm.tqdm(
                total=total,
                initial=done,
                desc="training",
                unit="step",
                dynamic_ncols=True,
                mininterval=0.5,
                smoothing=0,  # the time left is at the mean pace, as in plain lines
            )
            if reporter := activity.current():
                reporter.show = self._describe

    def advance(self, loss: float) -> None:
        """Advances by one step."""
        self._step += 1
        if self._bar is not None:
            self._exclude_compiling()
            activity.note_output()
            self._bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
            self._bar.update()

    def report(self, step: int, text: str) -> None:
        """Prints a line about the latest steps, unless there is a bar."""
        if self._bar is None and not self._quiet:
            self._exclude_compiling()
            elapsed = self._clock() - self._start_time
            seconds_per_step = elapsed / max(step - self._start_step, 1)
            left = _duration(seconds_per_step * (self._total - step))
            activity.note_output()
            terminal.print_message(f"step {step}/{self._total}  {text}  {left} left")

    def start_training(self) -> None:
        """Restarts the clock: what precedes the first step, as a late evaluation, is no pace."""
        self._exclude_compiling()
        self._exclude(self._clock() - self._start_time)

    def _exclude_compiling(self) -> None:
        """Excludes the time that was spent compiling since the last call."""
        seconds = activity.compile_seconds() - self._compiled
        self._compiled += seconds
        self._exclude(seconds)

    def _exclude(self, seconds: float) -> None:
        """Moves the start by some of the time that has passed."""
        self._start_time += seconds
        if self._bar is not None:
            self._bar.start_t += seconds

    def __str__(self) -> str:
        """Describes the run's state while nothing else is going on."""
        return "training" if self._bar is not None else f"training, step {self._step}/{self._total}"

    def _describe(self, text: str) -> None:
        """Shows an activity in the bar."""
        self._bar.set_description_str(printable(text, allowed="") or "training")

    def say(self, text: str) -> None:
        """Prints a message without breaking the bar."""
        if self._quiet:
            return
        activity.note_output()
        if self._bar is not None:
            self._bar.write(printable(text), file=sys.stderr)
        else:
            terminal.print_message(text)

    def close(self) -> None:
        """Closes the bar, which stays on the screen."""
        if self._bar is not None:
            self._bar.close()
        if reporter := activity.current():
            reporter.announces = False
            reporter.show = activity.print_line


def _duration(seconds: float) -> str:
    """Formats a duration as minutes and seconds, with hours if there are any."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
