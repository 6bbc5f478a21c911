"""One writer for a file: a lock beside it that ends with the process, however it ends."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from pathlib import Path
from weakref import WeakSet

from gradstat.errors import RunLogError

_HAS_LOCKS = importlib.util.find_spec("fcntl") is not None  # POSIX
if _HAS_LOCKS:
    import fcntl

_SUFFIX = "-lock"
_ATTEMPTS, _PAUSE = 10, 0.03
"""A reader that looks whether anyone writes holds the lock for a moment."""


class WriterLock:
    """Keeps other writers from a file until `release`.

    Raises:
        RunLogError: Another one writes it, or this system has no such locks.
        OSError: The lock cannot be made.
    """

    def __init__(self, path: Path) -> None:
        if not _HAS_LOCKS:
            raise RunLogError(
                f"a run log must be written where fcntl can lock files, got {sys.platform}, which "
                "has none; use log=gradstat.sinks.JsonLines(...), or Linux or macOS"
            )
        self._path = path.with_name(path.name + _SUFFIX)
        for attempt in range(_ATTEMPTS):
            self._file = self._path.open("a+")
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._file.seek(0)
                owner = self._file.read().strip()
                self._file.close()
                if attempt == _ATTEMPTS - 1:
                    raise RunLogError(
                        f"{path} must be written by one run at a time, got a second one while "
                        f"process {owner or 'of another run'} writes it; give each run, and each "
                        "rank, a path of its own, or end the other"
                    ) from None
                time.sleep(_PAUSE)
                continue
            if self._is_current():
                break
            self._file.close()  # its owner has just deleted it
        self._file.truncate(0)
        self._file.write(str(os.getpid()))
        self._file.flush()
        _held.add(self)

    def _is_current(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), self._path.stat())
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Let others write."""
        if not self._file.closed:
            self._path.unlink(missing_ok=True)
            self.forget()

    def forget(self) -> None:
        """Close the file; in a child process this leaves the lock to its parent."""
        self._file.close()
        _held.discard(self)


_held: WeakSet[WriterLock] = WeakSet()


def _forget_all() -> None:
    for lock in list(_held):
        lock.forget()


if _HAS_LOCKS:
    os.register_at_fork(after_in_child=_forget_all)


def is_written(path: Path) -> bool:
    """Whether a process of this machine, or this one, writes the file."""
    if not _HAS_LOCKS:
        return False
    try:
        with path.with_name(path.name + _SUFFIX).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
