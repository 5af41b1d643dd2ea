"""TensorBoard event files, written without TensorFlow."""

from collections.abc import Mapping

from etils import epath


class EventFile:
    """Event file of scalars, written in the background.

    Args:
        folder: local or `gs://`; created if absent.
    """

    def __init__(self, folder: epath.Path):
        from tensorboardX import SummaryWriter, record_writer

        record_writer.register_writer_factory("gs", _RemoteFiles())
        self._writer = SummaryWriter(str(folder))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Appends the scalars of a step."""
        from tensorboardX.proto.summary_pb2 import Summary

        # Not add_scalar, which would replace the @ in names such as mrr@10.
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._writer.file_writer.add_summary(Summary(value=scalars), step)
        self._writer.flush()

    def close(self) -> None:
        """Writes the remaining scalars and closes the file."""
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
