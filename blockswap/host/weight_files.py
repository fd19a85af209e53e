"""The files that a model's weights are read from."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

from ...hardware import disk
from ...hardware.disk import FileRegion
from ..device.worker import join_workers
from ..errors import WeightFileError


class WeightFiles:
    """Open files of weights; each reading checks that a file is still the one that was mapped."""

    def __init__(self) -> None:
        self._readers: dict[tuple[str, disk.FileIdentity], disk.FileReader] = {}

    def read(self, pieces: Iterable[tuple[FileRegion, memoryview]]) -> None:
        """Fills each buffer with the bytes of its region.

        Raises:
            WeightFileError: A file has changed, is gone or cannot be read; none of the bytes may be used.
        """
        of_file: dict[disk.FileReader, list[tuple[int, memoryview]]] = {}
        try:
            for region, buffer in pieces:
                of_file.setdefault(self._reader(region), []).append((region.offset, buffer))
            for reader, parts in of_file.items():
                reader.read(parts)
        except disk.WeightFileError as failure:
            raise WeightFileError(str(failure)) from failure

    def read_ahead(self, regions: Iterable[FileRegion]) -> None:
        """Lets the system read these bytes into its cache of files, if it can."""
        with contextlib.suppress(disk.WeightFileError):  # the reading itself reports it
            for region in regions:
                self._reader(region).read_ahead(region.offset, region.nbytes)

    def close(self) -> None:
        """Closes the files; the next reading opens its file again."""
        with contextlib.ExitStack() as stack:
            while self._readers:
                stack.callback(self._readers.popitem()[1].close)

    def _reader(self, region: FileRegion) -> disk.FileReader:
        key = region.path, region.identity
        if key not in self._readers:
            self._readers[key] = disk.FileReader(*key, on_thread_start=join_workers)
        return self._readers[key]
