"""Files of tables: .npz and .safetensors, with a JSON header and no pickle."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from gradstat.columns import COLUMN_NAMES, NUM_RAW_COLUMNS
from gradstat.errors import ArgumentValueError, import_optional

Header = dict[str, Any]
Arrays = dict[str, NDArray[Any]]
BuiltT = TypeVar("BuiltT")

_FORMAT = 1
_KEY = "gradstat"


def write_table(path: str | os.PathLike[str], header: Header, arrays: Arrays) -> None:
    """Write a header and arrays to a file that `read_table` reads back exactly.

    Raises:
        ArgumentValueError: The path ends in neither .npz nor .safetensors.
        MissingPackageError: .safetensors without the package.
    """
    path, suffix = _checked_suffix(path)
    columns = COLUMN_NAMES[:NUM_RAW_COLUMNS]
    text = json.dumps({"format": _FORMAT, "columns": columns, **header})
    if suffix == ".safetensors":
        data = _import_safetensors("safetensors.numpy").save(arrays, metadata={_KEY: text})
        path.write_bytes(data)
        return
    with path.open("wb") as file:  # numpy appends .npz to a name that it does not know
        # Typed loosely: the stub takes any keyword for its one option.
        members: dict[str, Any] = {"header": np.frombuffer(text.encode(), np.uint8), **arrays}
        np.savez_compressed(file, **members)


def read_table(path: str | os.PathLike[str], build: Callable[[Header, Arrays], BuiltT]) -> BuiltT:
    """Return what ``build`` makes of a file's header and arrays.

    Raises:
        ArgumentValueError: Another suffix, or the file is none of ours.
        FileNotFoundError: There is no such file.
        MissingPackageError: .safetensors without the package.
    """
    path, suffix = _checked_suffix(path)
    try:
        return build(*(_read_npz if suffix == ".npz" else _read_safetensors)(path))
    except (OSError, ImportError):
        raise
    except Exception as error:  # numpy, zipfile, zlib, json and safetensors share no base
        raise ArgumentValueError(
            f"{path} must be a file that StatTable.save wrote; reading it failed: "
            f"{type(error).__name__}: {error}"
        ) from error


def _checked_suffix(path: str | os.PathLike[str]) -> tuple[Path, str]:
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in (".npz", ".safetensors"):
        raise ArgumentValueError(f"path must end in .npz or .safetensors, got {str(path)!r}")
    return path, suffix


def _read_npz(path: Path) -> tuple[Header, Arrays]:
    with np.load(path, allow_pickle=False) as file:
        arrays = {key: file[key] for key in file.files}
    return _parse_header(arrays.pop("header").tobytes()), arrays


def _read_safetensors(path: Path) -> tuple[Header, Arrays]:
    with _import_safetensors("safetensors").safe_open(path, framework="numpy") as file:
        arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        return _parse_header(file.metadata()[_KEY]), arrays


def _parse_header(text: str | bytes) -> Header:
    header: Header = json.loads(text)
    if header["format"] != _FORMAT:
        raise ValueError(f"it has format {header['format']}, this version reads {_FORMAT}")
    return header


def _import_safetensors(module: str) -> Any:
    return import_optional(module, purpose="a .safetensors file", install="safetensors")
