"""Positioned reads of a file by several threads, which notice that the file has changed."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, fields
from functools import partial

from ..units import MIB

READERS = 4
"""Threads that share one read: one alone keeps no NVMe disk busy, nor copies from the page cache at full speed."""

# Large beside the cost of a call, small beside a block, so that the threads finish at about the same time.
_CHUNK_BYTES = 16 * MIB
# Linux drops what a call asks for beyond the disk's largest request, which is often 1280 KB (max_sectors_kb).
_AHEAD_BYTES = MIB


class WeightFileError(RuntimeError):
    """A file of weights cannot be read, or is no longer the one that the model was loaded from."""


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """Which file it is, and which content it has, as far as the file system tells.

    A program that writes through a mapping may change the time late or, on some network file systems, not at all.

    Attributes:
        modified_ns: time of the last change of the content in nanoseconds since 1970.
    """

    device: int
    inode: int
    size: int
    modified_ns: int

    @classmethod
    def of(cls, stat: os.stat_result) -> FileIdentity:
        """The identity that the system's answer about a file gives."""
        return cls(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)


class FileReader:
    """Reads one file at positions, with several threads, and notices that it has changed before a byte of it is used.

    A file that is deleted, or replaced by a rename, while it is open stays right: the open file is the old one. Windows
    allows neither while it is open.
    """

    def __init__(
        self,
        path: str,
        identity: FileIdentity,
        *,
        past_cache: bool = False,
        on_thread_start: Callable[[], None] | None = None,
    ) -> None:
        """Opens the file.

        Args:
            path: of the file.
            identity: of the file that is meant.
            past_cache: reads from the disk even what the system has in its cache. Offsets, sizes and addresses of the
                buffers must then be multiples of a page.
            on_thread_start: called in each thread that it starts.

        Raises:
            WeightFileError: the file is gone, may not be read, or is not the one with this identity; or the system has
                no reads past its cache here.
        """
        self._path, self._identity = path, identity
        self._files: list[io.FileIO] = []
        self._on_thread_start = on_thread_start
        self._pools = [self._new_pool()]
        self._release = weakref.finalize(self, _release, self._files, self._pools)
        self._release.atexit = False  # a read may still run then; the interpreter waits for it, the system closes files
        try:
            # Windows reads at a position by moving that of the open file, so that each thread needs one of its own.
            for _ in range(1 if hasattr(os, "preadv") else READERS):
                self._files.append(io.FileIO(path, opener=_open_past_cache if past_cache else None))
            self._check()
        except OSError as exc:
            self.close()
            raise WeightFileError(f"{path} cannot be opened ({_reason(exc)}); {_RELOAD}") from exc
        except WeightFileError:
            self.close()
            raise

    def read(self, pieces: Sequence[tuple[int, memoryview]]) -> None:
        """Fills each buffer with the file's bytes from the offset that stands beside it; waits for slow disks.

        One read at a time: the calling thread takes part. After an error the buffers hold nothing of use.

        Args:
            pieces: offsets in the file, and contiguous writable buffers.

        Raises:
            WeightFileError: the disk failed, or the file was changed before or during the read.
        """
        chunks = deque(_cut(pieces))
        self._check()
        failures: list[BaseException] = []
        helpers: list[Future[None]] = []
        try:
            for index in range(1, min(READERS, len(chunks))):
                helper = partial(_drain, self._path, self._files[index % len(self._files)], chunks, failures)
                if not self._start(helper, helpers):
                    break
            _drain(self._path, self._files[0], chunks, failures)
        finally:
            wait(helpers)  # none shall still write when the buffers go back
            self._check()  # last: of a file that was cut, the change is the cause and the short read its effect
        if failures:
            raise failures.pop()  # not kept in this frame, which its traceback holds: it would be a cycle

    def read_ahead(self, offset: int, nbytes: int) -> None:
        """Asks the system to read these bytes into its cache, without waiting for them, where the system has a way.

        The call itself takes as long as the disk's queue is full. It never raises.
        """
        if not hasattr(os, "posix_fadvise"):
            return
        with contextlib.suppress(OSError, ValueError, OverflowError):  # ValueError: it is closed
            descriptor = self._files[0].fileno()
            for start in range(offset, offset + nbytes, _AHEAD_BYTES):
                length = min(_AHEAD_BYTES, offset + nbytes - start)
                os.posix_fadvise(descriptor, start, length, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Closes the file and ends the threads; harmless when repeated. No read may be running."""
        self._release()

    def _new_pool(self) -> ThreadPoolExecutor:
        """It starts threads when they are needed."""
        return ThreadPoolExecutor(READERS - 1, "blockswap-read", initializer=self._on_thread_start)

    def _start(self, work: Callable[[], None], helpers: list[Future[None]]) -> bool:
        """Whether another thread takes part: the system may refuse one, or the interpreter may be ending."""
        try:
            helpers.append(self._pools[0].submit(work))
        except RuntimeError:
            # The pool keeps the work that it could not start a thread for, and a thread that it has may do it.
            self._pools[0].shutdown(cancel_futures=True)
            self._pools[0] = self._new_pool()
            return False
        return True

    def _check(self) -> None:
        """Raises if an open file has changed."""
        for file in self._files:
            try:
                now = FileIdentity.of(os.fstat(file.fileno()))
            except OSError as exc:
                raise WeightFileError(f"{self._path} cannot be read any more ({_reason(exc)}); {_RELOAD}") from exc
            if now != self._identity:
                pairs = [(f.name, getattr(self._identity, f.name), getattr(now, f.name)) for f in fields(now)]
                changes = ", ".join(f"{name} was {old}, is {new}" for name, old, new in pairs if old != new)
                raise WeightFileError(f"{self._path} has changed since the model was loaded ({changes}); {_RELOAD}")


_RELOAD = "leave the file in place and load the model again"


def _open_past_cache(path: str, flags: int) -> int:
    if not hasattr(os, "O_DIRECT"):
        raise OSError(errno.EINVAL, "this system has no reads past its cache")
    return os.open(path, flags | os.O_DIRECT)


def _release(files: list[io.FileIO], pools: list[ThreadPoolExecutor]) -> None:
    for pool in pools:
        pool.shutdown(wait=False)  # it may run in a thread of the pool, which cannot wait for itself
    for file in files:
        file.close()


def _cut(pieces: Sequence[tuple[int, memoryview]]) -> Iterator[tuple[int, memoryview]]:
    """The pieces in chunks."""
    for offset, buffer in pieces:
        view = buffer.cast("B") if buffer.nbytes else buffer[:0]
        for start in range(0, view.nbytes, _CHUNK_BYTES):
            yield offset + start, view[start : start + _CHUNK_BYTES]


def _drain(path: str, file: io.FileIO, chunks: deque[tuple[int, memoryview]], failures: list[BaseException]) -> None:
    """Reads chunks that no other thread has taken, until none is left or one fails."""
    while True:
        try:
            offset, view = chunks.popleft()
        except IndexError:
            return
        try:
            _fill(path, file, offset, view)
        except Exception as failure:  # noqa: BLE001 - `read` raises it
            chunks.clear()  # a failing disk may take minutes for each
            failures.append(failure)
        except BaseException:
            chunks.clear()
            raise


def _fill(path: str, file: io.FileIO, offset: int, view: memoryview) -> None:
    """Fills one buffer. A read may return less than asked for (FUSE, signals): the next goes on from there."""
    filled = 0
    while filled < view.nbytes:
        try:
            count = _read_at(file, offset + filled, view[filled:])
        except OSError as exc:
            where = f"{view.nbytes - filled} bytes from byte {offset + filled}"
            message = f"reading {where} of {path} failed ({_reason(exc)})"
            raise WeightFileError(f"{message}; check the disk, then load the model again") from exc
        if count == 0:
            needed = f"bytes {offset} to {offset + view.nbytes} are needed"
            raise WeightFileError(f"{path} ends at byte {offset + filled} but {needed}; copy or download it again")
        filled += count


def _read_at(file: io.FileIO, offset: int, view: memoryview) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(file.fileno(), [view], offset)
    file.seek(offset)
    return file.readinto(view) or 0


def _reason(exc: OSError) -> str:
    return exc.strerror or str(exc)
