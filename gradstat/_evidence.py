"""Brings what gradstat holds of a run to the host, in the form that diagnosis reads."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence, Set
from functools import cache
from itertools import repeat
from operator import is_
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from gradstat import _kernels
from gradstat._batch_sample import MAX_ELEMENTS, BatchSample, TensorSample
from gradstat._names import modules_of, named_parameters
from gradstat._observations import Observation
from gradstat._optimizer_kind import as_number, is_scale_free
from gradstat._probes import Probe
from gradstat._watched import Watched
from gradstat.activations.table import ActivationTable
from gradstat.diagnosis.evidence import (
    Batch,
    Curve,
    Layer,
    ModelFacts,
    OptimizerFacts,
    Probes,
    Site,
)

Floats = NDArray[np.float64]

_NUMPY = (torch.float32, torch.float64, torch.float16, torch.int64, torch.uint8, torch.bool)
"""Dtypes that NumPy has too, and reads without a copy."""
Named = Sequence[tuple[str, nn.Parameter]]


class Facts(NamedTuple):
    """What is known of optimizer and model themselves."""

    layers: tuple[Layer, ...]
    optimizer: OptimizerFacts
    model: ModelFacts | None


def facts_of(optimizer: Optimizer, watched: Watched, known: Layers) -> Facts:
    """Return them as they are now. Synchronises where a learning rate is a tensor."""
    model, groups = watched.model, optimizer.param_groups
    parameters = watched.parameters(groups)
    group_of = {id(p): i for i, group in enumerate(groups) for p in group["params"]}
    owners: dict[int, str] = {}
    facts = None
    if model is not None:
        modules = [module for _, module in modules_of(model)]
        own: dict[int, nn.Parameter] = {}
        for module in modules:
            if module._parameters:
                kind = type(module).__name__
                for parameter in module._parameters.values():
                    key = id(parameter)
                    if parameter is not None and key not in own:  # the first is its owner
                        own[key], owners[key] = parameter, kind
        # Names are asked for only where some take no part in the steps.
        all_step = own.keys() <= group_of.keys() and all(p.requires_grad for p in own.values())
        named = [] if all_step else named_parameters(model)
        forgotten = watched.others.forgotten(named, group_of)
        facts = model_facts(own, named, modules, group_of.keys(), forgotten)
    layers = known.of(watched.names, parameters, owners, group_of)
    return Facts(layers, optimizer_facts(optimizer), facts)


def curve_of(observations: Iterable[Observation]) -> Curve:
    """Return scalars as arrays. Synchronises once where some lie on a device."""
    seen = list(observations)
    numbers, given = zip(*seen, strict=True) if seen else ((), ())
    steps = np.fromiter(numbers, np.int64, len(seen))
    if set(map(type, given)) == {float}:
        return Curve(steps, np.fromiter(given, np.float64, len(seen)))
    values = np.array([value if isinstance(value, float) else np.nan for value in given])
    late = [i for i, v in enumerate(given) if isinstance(v, Tensor) and not v.is_meta]
    if late:
        tensors = [_real(given[i]).reshape(()) for i in late]
        device = tensors[0].device  # a run may go on on another one
        values[late] = torch.stack([t.to(device) for t in tensors]).cpu().numpy()
    return Curve(steps, values)


class ProbeArrays:
    """The probes as arrays with what follows from them, kept until there is another probe."""

    def __init__(self) -> None:
        self._done: list[Probe] = []
        self._n_layers = 0
        self._arrays: Probes | None = None

    def of(self, kept: Sequence[Probe], n_layers: int) -> Probes:
        """Return those that are finished. Where they are new, synchronises as `probes_of` does."""
        done = [probe for probe in kept if probe.changes is not None]
        is_known = n_layers == self._n_layers and len(done) == len(self._done)
        if self._arrays is None or not (is_known and all(map(is_, done, self._done))):
            self._done, self._n_layers = done, n_layers
            self._arrays = probes_of(done, n_layers)
        return self._arrays


def probes_of(done: Sequence[Probe], n_layers: int) -> Probes:
    """Return finished probes as arrays. Synchronises once for each kind of table."""

    def stacked(tables: list[Tensor | None], n_rows: int) -> Floats:
        """Return tables without their totals; the numbers of a column lie together, as before."""
        if not tables:
            return np.zeros((0, n_rows, _kernels.NUM_COLUMNS))
        known = [table for table in tables if table is not None]
        if len(known) < len(tables):
            some = known[0] if known else torch.empty(0, dtype=torch.float64)
            missing = some.new_full((n_rows + 1, _kernels.NUM_COLUMNS), torch.nan)
            known = [missing if table is None else table for table in tables]
        columns: Floats = torch.stack(known).mT.contiguous().cpu().numpy()
        return columns.swapaxes(1, 2)[:, :-1]

    gradients = stacked([probe.gradients for probe in done], n_layers)
    changes = stacked([probe.changes for probe in done], 2 * n_layers)
    slices = gradients
    if any(probe.slices is not None for probe in done):
        slices = stacked([p.gradients if p.slices is None else p.slices for p in done], n_layers)
    return Probes(
        steps=np.array([probe.step for probe in done], np.int64),
        lrs=np.array([[as_number(lr) for lr in probe.lrs] for probe in done], np.float64, ndmin=2),
        gradients=gradients,
        weights=changes[:, :n_layers],
        slices=slices,
        updates=changes[:, n_layers:],
    )


class BatchArrays:
    """The samples as arrays, each brought to the host once."""

    def __init__(self) -> None:
        self._known: WeakKeyDictionary[BatchSample, Batch] = WeakKeyDictionary()

    def of(self, samples: Sequence[BatchSample]) -> tuple[Batch, ...]:
        """Return them as arrays. Where some are new, synchronises as `batches_of` does."""
        new = [sample for sample in samples if sample not in self._known]
        self._known.update(zip(new, batches_of(new), strict=True))
        return tuple([self._known[sample] for sample in samples])

    def __reduce__(self) -> tuple[type[BatchArrays], tuple[()]]:
        return BatchArrays, ()


def batches_of(samples: Sequence[BatchSample]) -> list[Batch]:
    """Return samples as arrays. Synchronises where they lie on a device, once for each kind."""
    kinds: dict[Hashable, list[BatchSample]] = {}
    for sample in samples:
        kind = tuple(
            [
                (name, rows.shape, rows.device, shape, dtype, is_whole)
                for name, (rows, shape, dtype, is_whole) in sample.tensors.items()
            ]
        )
        kinds.setdefault(kind, []).append(sample)
    found: dict[BatchSample, Batch] = {}
    for alike in kinds.values():
        first = alike[0].tensors
        shapes = {name: kept.shape for name, kept in first.items()}
        integers = frozenset([name for name, kept in first.items() if _is_integer(kept)])
        pair = [first.get("outputs"), first.get("targets")]
        is_whole = all(kept is not None and kept.is_whole for kept in pair)
        rows = [_host_rows([sample.tensors[name].rows for sample in alike]) for name in first]
        columns = [list(zip(*column, strict=True)) for column in zip(*rows, strict=True)]
        for sample, *of_one in zip(alike, *columns, strict=True):
            arrays, ranges = [dict(zip(first, values, strict=True)) for values in of_one]
            found[sample] = Batch(
                step=sample.step,
                inputs=arrays.get("inputs"),
                outputs=arrays.get("outputs"),
                targets=arrays.get("targets"),
                ranges=ranges,
                shapes=shapes,
                integers=integers,
                is_paired=sample.is_paired,
                is_whole=is_whole,
                loss=_as_float(sample.loss),
            )
    return [found[sample] for sample in samples]


def _host_rows(tensors: list[Tensor]) -> tuple[list[Floats], list[tuple[float, float]]]:
    """Return tensors of one shape as arrays, and the smallest and the largest number of each.

    As many are brought at once as one sample may hold: each of them keeps the memory of all.
    """
    arrays: list[Floats] = []
    ranges: list[tuple[float, float]] = []
    count = max(1, MAX_ELEMENTS // tensors[0].numel())
    for start in range(0, len(tensors), count):
        stack = _to_numpy(torch.stack(tensors[start : start + count]))
        flat = stack.reshape(len(stack), -1)
        arrays.extend(stack)
        ranges += zip(flat.min(1).tolist(), flat.max(1).tolist(), strict=True)
    return arrays, ranges


class Layers:
    """What is known of each watched parameter, made anew where some of it has changed."""

    def __init__(self) -> None:
        self._columns: tuple[Sequence[Any], ...] = ()
        self._layers: tuple[Layer, ...] = ()

    def of(
        self,
        names: Sequence[str],
        watched: Sequence[Tensor],
        owners: Mapping[int, str],
        group_of: Mapping[int, int],
    ) -> tuple[Layer, ...]:
        """Return it, one for each parameter.

        Args:
            names: Their names.
            watched: The parameters.
            owners: Class of the module that a parameter belongs to, by the parameter's ``id``.
            group_of: Its group in the optimizer.
        """
        ids = list(map(id, watched))
        columns = (
            names,
            [parameter.shape for parameter in watched],
            [parameter.dtype for parameter in watched],
            list(map(owners.get, ids, repeat(""))),
            list(map(group_of.__getitem__, ids)),
        )
        if columns != self._columns:
            _, shapes, dtypes, classes, groups = self._columns = columns
            epsilons = map(_epsilon, dtypes)
            self._layers = tuple(map(Layer, names, map(tuple, shapes), epsilons, classes, groups))
        return self._layers


@cache
def _epsilon(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def sites_of(table: ActivationTable) -> tuple[Site, ...]:
    """Return the rows of a table. Synchronises."""
    return tuple(
        map(
            Site,
            table.names,
            table.kinds,
            table.units.tolist(),
            table.dead_units.tolist(),
            table.saturated_fractions.tolist(),
        )
    )


def optimizer_facts(optimizer: Optimizer) -> OptimizerFacts:
    """Return what the rules ask of an optimizer. Synchronises where a learning rate is a tensor."""
    groups = optimizer.param_groups
    first = groups[0] if groups else {}
    betas = first.get("betas")
    return OptimizerFacts(
        name=type(optimizer).__name__,
        is_adaptive=is_scale_free(optimizer),
        momentum=as_number(
            betas[0] if isinstance(betas, tuple | list) and betas else first.get("momentum"), 0.0
        ),
        weight_decay=max((as_number(g.get("weight_decay"), 0.0) for g in groups), default=0.0),
        lrs=tuple(as_number(group.get("lr")) for group in groups),
    )


def model_facts(
    own: Mapping[int, nn.Parameter],
    named: Named,
    modules: Sequence[nn.Module],
    stepped: Set[int],
    forgotten: tuple[str, ...],
) -> ModelFacts:
    """Return what the rules ask of a model.

    Args:
        own: Its parameters by id.
        named: The same with their names, where one does not require a gradient.
        modules: Its modules.
        stepped: Ids of the optimizer's parameters.
        forgotten: Names of others that have a gradient.
    """
    kinds = set(map(type, modules))
    drops = any(issubclass(kind, _DropoutNd) for kind in kinds)
    n_own = len(stepped & own.keys())
    return ModelFacts(
        modules=tuple([type(module).__name__ for module in modules if not module._modules]),
        n_parameters=sum([p.numel() for p in own.values()]),
        frozen=tuple([name for name, p in named if not p.requires_grad]),
        forgotten=forgotten,
        n_strangers=len(stepped) - n_own,
        n_own=n_own,
        dropout=max(
            [float(m.p) for m in modules if drops and isinstance(m, _DropoutNd)], default=0.0
        ),
        has_tables=_hold_table(modules, kinds),
    )


def _hold_table(modules: Sequence[nn.Module], kinds: Set[type[nn.Module]]) -> bool:
    own_kinds = {kind for kind in kinds if not kind.__module__.startswith("torch.")}
    held = [t for module in modules if module._buffers for t in module._buffers.values()]
    held += [t for m in modules if type(m) in own_kinds for t in m._parameters.values()]
    known = [tensor for tensor in held if tensor is not None and not is_lazy(tensor)]
    return any(tensor.dim() > 1 and tensor.shape[-2] > 1 for tensor in known)


def _as_float(loss: float | Tensor | None) -> float | None:
    if isinstance(loss, Tensor):
        return float(curve_of([Observation(0, loss)]).values[0])
    return loss


def _to_numpy(rows: Tensor) -> Floats:
    if rows.is_cpu and rows.dtype in _NUMPY:
        return rows.numpy().astype(np.float64, copy=False)
    host: Floats = _real(rows).cpu().numpy()
    return host


def _real(value: Any) -> Tensor:
    tensor: Tensor = value.abs() if value.is_complex() else value
    return tensor.double()


def _is_integer(kept: TensorSample) -> bool:
    return not (kept.dtype.is_floating_point or kept.dtype.is_complex)
