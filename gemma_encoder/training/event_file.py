"""TensorBoard event files, written without TensorFlow."""

import contextlib
import time
from collections.abc import Mapping

from etils import epath


class EventFile:
    """Event file of scalars.

    It is written when `write` is called: the thread in which a SummaryWriter writes would end at a
    full disk, and training would wait for it.

    Args:
        folder: local or `gs://`; created if absent.
    """

    def __init__(self, folder: epath.Path):
        from tensorboardX import event_file_writer, record_writer

        record_writer.register_writer_factory("gs", _RemoteFiles())
        record_writer.directory_check(str(folder))
        self._writer = event_file_writer.EventsWriter(str(folder / "events"))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Appends the scalars of a step."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        event = Event(wall_time=time.time(), step=step, summary=Summary(value=scalars))
        self._writer.write_event(event)
        self._writer.flush()

    def close(self) -> None:
        """Closes the file; errors of scalars that could not be written were raised before."""
        with contextlib.suppress(OSError):
            self._writer.close()


class _RemoteFiles:
    """Opens `gs://` files for tensorboardX through epath, as the other files of a workdir."""

    def directory_check(self, path: str) -> None:
        epath.Path(path).mkdir(parents=True, exist_ok=True)

    def open(self, path: str) -> "_RemoteFile":
        return _RemoteFile(path)


class _RemoteFile:
    """A file in cloud storage, which cannot be appended to: each flush writes all of it."""

    def __init__(self, path: str):
        self._path = epath.Path(path)
        self._content = b""

    def write(self, content: bytes) -> None:
        self._content += content

    def flush(self) -> None:
        self._path.write_bytes(self._content)

    close = flush
