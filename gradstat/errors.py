"""Every error that gradstat raises on purpose: one tree, and the built-in types callers expect."""

from __future__ import annotations

import importlib
from typing import Any


class GradstatError(Exception):
    """Base of all errors of this package: ``except GradstatError`` catches them all.

    A message states what must hold, what was received, and what to do about it.
    """


class ArgumentValueError(GradstatError, ValueError):
    """An argument has the right type and a value that cannot be used.

    The message names the argument and ends with a value that works.
    """


class ArgumentTypeError(GradstatError, TypeError):
    """An argument has the wrong type.

    The message names the argument, the type received and the types accepted.
    """


class UnsupportedTensorError(ArgumentTypeError):
    """A tensor holds no numbers that can be measured: meta, fake, quantised or integer.

    The message names the layer (or the position in the list) and the conversion that helps.
    """


class NonFiniteNormError(GradstatError, RuntimeError):
    """The total norm is NaN or Inf and the caller asked for an error in that case.

    The message names the layers that hold the NaN or Inf, where they are known.
    """


class NativeModuleError(GradstatError, ImportError):
    """The compiled module is missing or does not fit this torch.

    The message says what failed to load and the command that installs it again.
    """


class MissingPackageError(GradstatError, ImportError):
    """An optional package that the call needs is not installed.

    The message ends with the ``pip install`` command that adds it.
    """


class CudaError(GradstatError, RuntimeError):
    """CUDA refused an operation, or the operation is not allowed now.

    The message carries CUDA's own words where there are any, and the way around.
    """


class RunLogError(GradstatError):
    """A file is no run log that can be read or written here.

    The message says why: another kind of file, another version, another process that writes it, or
    what the file system answered.
    """


class RunNotFoundError(RunLogError, FileNotFoundError):
    """There is no file at the path of a run log.

    The message names the path.
    """

    def __str__(self) -> str:
        return str(self.args[0])


class LayerNotFoundError(GradstatError, KeyError):
    """A table has no row of that name or index.

    The message lists the names that come closest.
    """

    def __str__(self) -> str:
        # KeyError shows the repr of its argument, which puts quotes and escapes around a sentence.
        return str(self.args[0]) if self.args else ""


def import_optional(module: str, *, purpose: str, install: str) -> Any:
    """Return the imported optional module.

    Args:
        module: Dotted name of the module.
        purpose: What needs it, as the subject of a sentence: ``"to_pandas()"``.
        install: What to hand to ``pip install`` so that it is there.

    Raises:
        MissingPackageError: The module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        message = f"{purpose} needs the package {package}, which cannot be imported ({error}); "
        raise MissingPackageError(f"{message}run: pip install {install}") from error
