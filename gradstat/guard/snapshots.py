"""The last k snapshots, in host memory or on disk; one on disk is there whole or not at all."""

from __future__ import annotations

import logging
import os
import pickle
import zipfile
from collections import deque
from pathlib import Path
from typing import Any, Protocol

import torch

State = dict[str, Any]

_logger = logging.getLogger("gradstat")


class Ring(Protocol):
    """Snapshots, oldest first."""

    def put(self, state: State) -> None:
        """Keep one more, and let the oldest go where there are too many."""

    def newest(self) -> State | None:
        """Return the newest that can be read."""

    def drop_newest(self) -> None:
        """Let the newest go."""

    def __len__(self) -> int: ...


class HostRing:
    """Snapshots in host memory.

    Args:
        keep: Snapshots kept.
    """

    def __init__(self, keep: int) -> None:
        self._states: deque[State] = deque(maxlen=keep)

    def put(self, state: State) -> None:
        """Keep one more, and let the oldest go where there are too many."""
        self._states.append(state)

    def newest(self) -> State | None:
        """Return the newest; it is not to be changed."""
        return self._states[-1] if self._states else None

    def drop_newest(self) -> None:
        """Let the newest go."""
        self._states.pop()

    def __len__(self) -> int:
        return len(self._states)


class DiskRing:
    """Snapshots as files ``snapshot-STEP.pt`` that ``torch.load(..., weights_only=True)`` reads.

    Files that it finds belong to it from `adopt` on.

    Args:
        directory: Where they go; made where missing. One for each run, and each process of it.
        keep: Snapshots kept.
    """

    def __init__(self, directory: str | os.PathLike[str], keep: int) -> None:
        self._directory = Path(directory)
        self._keep = keep
        self._directory.mkdir(parents=True, exist_ok=True)
        for left_over in self._directory.glob("snapshot-*.pt.partial"):
            left_over.unlink(missing_ok=True)
        self._paths: list[Path] = []

    def adopt(self) -> None:
        """Take over the snapshots that are there, the one written last being the newest."""
        found = self._directory.glob("snapshot-*.pt")
        self._paths = sorted(found, key=lambda path: (path.stat().st_mtime_ns, path.name))

    def put(self, state: State) -> None:
        """Keep one more, and let the oldest go where there are too many."""
        path = self._directory / f"snapshot-{state['step']:012d}.pt"
        write_atomically(path, state)
        self._paths = [*(known for known in self._paths if known != path), path]
        while len(self._paths) > self._keep:
            self._paths.pop(0).unlink(missing_ok=True)

    def newest(self) -> State | None:
        """Return the newest that can be read; one that cannot is passed over with a warning."""
        while self._paths:
            try:
                return read(self._paths[-1])
            except (OSError, RuntimeError, EOFError, zipfile.BadZipFile, pickle.PickleError) as bad:
                _logger.warning(
                    "snapshot %s cannot be read and is ignored: %s", self._paths[-1], bad
                )
                self._paths.pop()
        return None

    def drop_newest(self) -> None:
        """Remove the newest."""
        self._paths.pop().unlink(missing_ok=True)

    def __len__(self) -> int:
        return len(self._paths)


def write_atomically(path: Path, state: State) -> None:
    """Write a file that is there whole or not at all, whenever process or machine stop.

    Raises:
        OSError, RuntimeError: There is no room, say; nothing is left of the file.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the new name, too, has to reach the disk
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def read(path: Path) -> State:
    """Return a snapshot; its checksums are compared, which torch does not do.

    Raises:
        OSError, RuntimeError, EOFError, zipfile.BadZipFile, pickle.PickleError: It is damaged.
    """
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(f"the checksum of {damaged} does not fit")
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or "step" not in state:
        raise pickle.UnpicklingError("it holds something else than a snapshot")
    return state
