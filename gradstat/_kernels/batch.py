"""The tensors of one call, unpacked once, one part a device."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradstat._kernels.compiled import _native
from gradstat._readable import Readable, make_readable

NameOf = Callable[[int], str]

_CPU = torch.device("cpu")
_WIDE_DTYPES = (torch.float64, torch.complex128)


def describe_position(index: int) -> str:
    """Return how an error names a tensor that has no name."""
    return f"tensor {index}"


@dataclass(slots=True)
class Part:
    """The tensors of a batch that lie on one device; at all other positions it has none."""

    device: torch.device
    tensors: Any
    """``_native.TensorList`` for the kernels, or a plain list for `_fallback`."""

    readable: dict[int, Readable]
    """What stands in for the tensors that no kernel reads as they are."""

    @property
    def native(self) -> bool:
        """Whether the compiled kernels read this part."""
        return isinstance(self.tensors, _native.TensorList)

    @property
    def objects(self) -> list[Tensor | None]:
        """The tensors that are read, `None` where there is none."""
        objects: list[Tensor | None] = self.tensors.objects if self.native else self.tensors
        return objects


@dataclass(slots=True)
class Batch:
    """The tensors of one call, by device; the first part is the first tensor's device."""

    parts: list[Part]
    size: int
    originals: list[Tensor | None] | None
    """The tensors as they came, kept only where some had to be replaced for reading."""

    result_dtype: torch.dtype
    """Dtype of a norm: fp64 where a tensor is, else fp32."""

    @property
    def device(self) -> torch.device:
        """Device of the results: that of the only part, and the CPU's where there are several."""
        part = self.parts[0]
        return part.device if len(self.parts) == 1 and part.native else torch.device("cpu")

    @property
    def is_empty(self) -> bool:
        """Whether every tensor is missing."""
        for part in self.parts:
            if part.native:
                if part.tensors.n_present:
                    return False
            elif any(tensor is not None for tensor in part.objects):
                return False
        return True

    @property
    def note(self) -> str:
        """What a table of this batch says of how it was made; empty where by kernels alone."""
        devices = [part.device.type for part in self.parts if not part.native]
        return f"{', '.join(devices)} tensors by plain torch operations" if devices else ""

    def tensors(self) -> list[Tensor]:
        """The tensors as they came, without the missing ones."""
        items = self.originals if self.originals is not None else self.parts[0].objects
        return [item for item in items if item is not None]


class RepeatedError(Exception):
    """The list names one parameter several times; ``positions`` are the later ones."""

    def __init__(self, positions: list[int]) -> None:
        super().__init__(positions)
        self.positions = positions


def _kernel_device(device: torch.device) -> bool:
    if device.type == "cpu":
        return True
    return device.type == "cuda" and torch.version.hip is None and _native.cuda_is_built()


def gather(
    items: Sequence[Any],
    *,
    take_grad: bool = False,
    or_itself: bool = False,
    name_of: NameOf = describe_position,
) -> Batch:
    """Return the batch of these tensors, or of their gradients.

    Args:
        items: Tensors, or parameters where ``take_grad``. `None` is a missing tensor.
        take_grad: Take ``.grad`` of each.
        or_itself: Take a tensor that is no parameter as a gradient itself, where ``take_grad``.
        name_of: Gives the name of the tensor at a position, for an error.

    Raises:
        ArgumentTypeError: An item is no tensor.
        UnsupportedTensorError: A tensor's numbers cannot be read.
        RepeatedError: An item stands in the list twice (only where ``take_grad``).
    """
    tensors = _native.TensorList(items, take_grad, or_itself)
    if take_grad and tensors.repeated:
        # None, a gradient that is missing, may stand anywhere and often.
        repeated = [index for index in tensors.repeated if items[index] is not None]
        if repeated:
            raise RepeatedError(repeated)
    if not tensors.irregular:
        device = torch.device("cuda", tensors.device_index) if tensors.on_cuda else _CPU
        if _kernel_device(device):
            dtype = torch.float64 if tensors.has_f64 else torch.float32
            return Batch([Part(device, tensors, {})], len(tensors), None, dtype)
    originals: list[Tensor | None] = tensors.objects
    by_device: dict[torch.device, dict[int, Readable]] = {}
    suspects = set(tensors.irregular)
    for index, tensor in enumerate(originals):
        if tensor is None:
            continue
        readable = make_readable(tensor, name_of(index)) if index in suspects else Readable(tensor)
        by_device.setdefault(readable.tensor.device, {})[index] = readable
    parts = []
    for device, chosen in by_device.items():
        objects: list[Tensor | None] = [None] * len(originals)
        for index, readable in chosen.items():
            objects[index] = readable.tensor
        replaced = {i: r for i, r in chosen.items() if r.tensor is not originals[i]}
        native = _kernel_device(device)
        if not native:
            _warn_fallback(device)
        parts.append(
            Part(device, _native.TensorList(objects, False) if native else objects, replaced)
        )
    if not parts:
        parts = [Part(torch.device("cpu"), _native.TensorList(originals, False), {})]
    wide = any(t is not None and t.dtype in _WIDE_DTYPES for t in originals)
    return Batch(parts, len(originals), originals, torch.float64 if wide else torch.float32)


def _warn_fallback(device: torch.device) -> None:
    warnings.warn(
        f"gradstat has no kernel for {device.type} tensors here and measures them with plain torch "
        "operations, with equal results but more slowly; gradstat.show_config() says why. To "
        'silence: warnings.filterwarnings("ignore", message="gradstat has no kernel")',
        RuntimeWarning,
        stacklevel=5,  # the caller of grad_stats, clip_grad_norm_ and the like
    )
