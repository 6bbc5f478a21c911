"""Parameters of a model that the watched optimizer does not hold: whether somebody changes them."""

from __future__ import annotations

from collections.abc import Container, MutableMapping
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from gradstat import _kernels
from gradstat._names import named_parameters
from gradstat.errors import GradstatError

Named = list[tuple[str, nn.Parameter]]


class Others:
    """What those parameters were when the run began.

    A parameter's version does not tell: fused optimizers and writes to ``.data`` leave it as it is.
    So its table is kept, 96 bytes, in which every change of an element shows.
    """

    def __init__(self) -> None:
        self._first: MutableMapping[Tensor, Tensor | None] = WeakTensorKeyDictionary()
        self._is_noted = False

    def note(self, model: nn.Module, groups: list[dict[str, Any]]) -> None:
        """Note them as they are, at the first call. Does not synchronise."""
        if self._is_noted:
            return
        self._is_noted = True
        stepped = {id(parameter) for group in groups for parameter in group["params"]}
        for _, parameter in _others(named_parameters(model), stepped):
            self._first[parameter] = _table(parameter)

    def forgotten(self, named: Named, stepped: Container[int]) -> tuple[str, ...]:
        """Return which of a model's parameters have a gradient and have never changed.

        ``stepped`` are the ids of the optimizer's parameters. Synchronises.

        One that has come to require a gradient since the last look is noted first.
        """
        found = []
        for name, parameter in _others(named, stepped):
            if parameter.grad is None:
                continue
            table = _table(parameter)
            first = self._first.setdefault(parameter, table)
            if first is not None and first is not table and _are_equal(first, table):
                found.append(name)
        return tuple(found)


def _others(named: Named, stepped: Container[int]) -> Named:
    return [(name, p) for name, p in named if id(p) not in stepped and p.requires_grad]


def _table(parameter: Tensor) -> Tensor | None:
    """Return what is measured of it; None where that cannot be."""
    try:
        return _kernels.moments(_kernels.gather([parameter.detach()]))[0]
    except GradstatError:
        return None


def _are_equal(first: Tensor, second: Tensor | None) -> bool:
    if second is None:
        return False
    return first.cpu().numpy().tobytes() == second.cpu().numpy().tobytes()
