"""The parameters that `attach` watches, with their names, as the optimizer's groups change."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from gradstat._names import named_parameters as named_parameters_of
from gradstat._others import Others
from gradstat.errors import ArgumentTypeError, ArgumentValueError

Filter = Callable[[str, Tensor], bool]
Groups = list[dict[str, Any]]


class Watched:
    """Which parameters of an optimizer are measured, and what they are called.

    A name comes from the model (as it is without `torch.compile` and DistributedDataParallel, so
    that checkpoints fit with and without them) or the pairs, else from the optimizer
    (``param_names``, where it was made from ``named_parameters()``), else from the place:
    ``group0.param3``.

    Args:
        model: Gives names.
        named_parameters: Gives names in its place.
        keep: ``keep(name, parameter)`` tells whether a parameter is watched.

    Raises:
        ArgumentTypeError: An argument is of the wrong type.
        ArgumentValueError: Both model and pairs are given, or a name stands twice.
    """

    def __init__(
        self,
        model: torch.nn.Module | None,
        named_parameters: Iterable[tuple[str, Tensor]] | None,
        keep: Filter | None,
    ) -> None:
        if keep is not None and not callable(keep):
            raise ArgumentTypeError(
                f"filter must be a function, got {type(keep).__name__}; pass for example "
                'filter=lambda name, parameter: "bias" not in name'
            )
        self.model = model
        self.others = Others()
        self._pairs = _names_by_id(model, named_parameters)
        self._keep = keep
        self._lists: list[tuple[list[Tensor], int]] = []
        self._places: list[int] | None = None
        self.names: tuple[str, ...] = ()
        """Names of the watched parameters, in the order of the groups."""

    def parameters(self, groups: Groups) -> list[Tensor]:
        """Return the watched parameters, one for each of `names`, which follow the groups.

        A parameter that is exchanged in its place keeps its name.
        """
        if len(groups) != len(self._lists):
            self._follow(groups)
        for index, (known, count) in enumerate(self._lists):
            if groups[index]["params"] is not known or len(known) != count:
                self._follow(groups)
                break
        found = groups[0]["params"] if len(groups) == 1 else _parameters(groups)
        return found if self._places is None else [found[place] for place in self._places]

    def _follow(self, groups: Groups) -> None:
        """Find the names anew, after `add_param_group` and its like."""
        self._lists = [(group["params"], len(group["params"])) for group in groups]
        all_names = self.all_names(groups)
        places: dict[int, int] = {}
        for place, (name, parameter) in enumerate(zip(all_names, _parameters(groups), strict=True)):
            if self._keep is None or self._keep(name, parameter):
                places.setdefault(id(parameter), place)
        chosen = list(places.values())
        self._places = chosen if len(chosen) < len(all_names) else None
        self.names = tuple(all_names[place] for place in chosen)

    def all_names(self, groups: Groups) -> list[str]:
        """Return the name of every parameter of the groups, watched or not."""
        if self.model is not None:  # it may have grown since; what has left both is let go
            stays = {id(p): self._pairs[id(p)] for p in _parameters(groups) if id(p) in self._pairs}
            self._pairs = stays | _names_by_id(self.model, None)
        names = []
        for index, group in enumerate(groups):
            own = group.get("param_names")
            for place, parameter in enumerate(group["params"]):
                fallback = own[place] if own is not None else f"group{index}.param{place}"
                names.append(self._pairs.get(id(parameter), (fallback, parameter))[0])
        return names


def _parameters(groups: Groups) -> list[Tensor]:
    return list(chain.from_iterable(group["params"] for group in groups))


def _names_by_id(
    model: torch.nn.Module | None, named_parameters: Iterable[tuple[str, Tensor]] | None
) -> dict[int, tuple[str, Tensor]]:
    """Return names with their parameters; holding these keeps the ids theirs."""
    if model is not None and not isinstance(model, torch.nn.Module):
        raise ArgumentTypeError(
            f"model must be a torch.nn.Module, got {type(model).__name__}; pass (name, parameter) "
            "pairs as named_parameters="
        )
    if model is not None and named_parameters is not None:
        raise ArgumentValueError("model and named_parameters must not both be given; leave one out")
    if model is not None:
        return {id(p): (name, p) for name, p in named_parameters_of(model)}
    found: dict[int, tuple[str, Tensor]] = {}
    names: set[str] = set()
    for pair in named_parameters or ():
        if not (
            isinstance(pair, tuple)
            and len(pair) == 2
            and isinstance(pair[0], str)
            and isinstance(pair[1], Tensor)
        ):
            raise ArgumentTypeError(
                f"named_parameters must hold (name, parameter) pairs, got {type(pair).__name__}; "
                "pass model.named_parameters()"
            )
        if pair[0] in names:
            raise ArgumentValueError(
                f"named_parameters must not hold a name twice, got {pair[0]!r}; give each "
                "parameter a name of its own"
            )
        names.add(pair[0])
        found[id(pair[1])] = pair
    return found
