"""What is known of a run, on the host: the only thing that rules look at.

Everything is a plain number, name or NumPy array; nothing here waits, and nothing knows of torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# Places of the columns in a table's row (docs/statistics.md).
NUMEL, ZEROS, NANS, INFS, SUM, ABS_SUM, SQ_SUM, ABS_MAX, ABS_MIN, ROWS, DEAD_ROWS, L2 = range(12)

_EMBEDDINGS = ("Embedding", "EmbeddingBag")
_NEARLY = 0.1
"""Distance of a deviation from 1, up to which it may be that of torch's tables."""


class Layer(NamedTuple):
    """A parameter that is watched."""

    name: str
    shape: tuple[int, ...]
    epsilon: float
    """Distance from 1 to the next number of its dtype."""

    module: str
    """Class of the module that owns it, such as ``Linear``; empty where no model was given."""

    group: int
    """Its group in the optimizer."""

    @property
    def fan_in(self) -> int:
        """Numbers that each output is a sum of."""
        return math.prod(self.shape[1:])


@dataclass(frozen=True)
class Probes:
    """Steps spread over the run, each with tables of (layers, 12); NaN rows are missing."""

    steps: NDArray[np.int64]
    """Numbers of the steps, the run's first being 1: (p,)."""

    lrs: Floats
    """Learning rate of each group: (p, groups)."""

    gradients: Floats
    """Tables of the gradients, in true units, before clipping: (p, layers, 12)."""

    weights: Floats
    """Tables of the parameters before the step, of large ones of their first elements."""

    slices: Floats
    """Tables of the gradients of the same elements, in the unit that they came in."""

    updates: Floats
    """Tables of the change of the same elements."""

    @cached_property
    def gradient_rms(self) -> Floats:
        """Root mean square of each gradient: (p, layers); NaN where it is missing."""
        return rms(self.gradients)

    @cached_property
    def weight_rms(self) -> Floats:
        """Root mean square of each parameter: (p, layers)."""
        return rms(self.weights)

    @cached_property
    def first_std(self) -> Floats:
        """Standard deviation of each parameter in the first probe: (layers,)."""
        first = self.weights[0]
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = first[:, SUM] / first[:, NUMEL]
        deviation: Floats = np.sqrt(np.maximum(rms(first) ** 2 - mean**2, 0.0))
        return deviation

    @cached_property
    def total_norms(self) -> Floats:
        """Norm of all gradients together: (p,)."""
        return norms(self.gradients[..., L2])

    @cached_property
    def update_ratio(self) -> Floats:
        """Norm of each parameter's change over its own norm: (p, layers)."""
        with np.errstate(invalid="ignore", divide="ignore"):
            ratio: Floats = self.updates[..., L2] / self.weights[..., L2]
        return ratio


@dataclass(frozen=True)
class Curve:
    """A number that was observed again and again."""

    steps: NDArray[np.int64]
    """Finished steps at each value."""

    values: Floats

    def __len__(self) -> int:
        return len(self.values)

    @cached_property
    def finite(self) -> Floats:
        """Its finite values."""
        return self.values[np.isfinite(self.values)]


@dataclass(frozen=True)
class Batch:
    """A sample of one batch; an array that was not observed is None."""

    step: int
    inputs: Floats | None
    """(n, features)."""

    outputs: Floats | None
    """(n, classes or features)."""

    targets: Floats | None
    """(n,) classes or numbers, or (n, features)."""

    ranges: Mapping[str, tuple[float, float]]
    """Smallest and largest number of each array; NaN where it holds some."""

    shapes: Mapping[str, tuple[int, ...]]
    """Shapes of the whole tensors."""

    integers: frozenset[str]
    """Names of those whose dtype is an integer or bool."""

    is_paired: bool
    """Whether row i of the outputs belongs to row i of the targets."""

    is_whole: bool
    """Whether outputs and targets are all there, so that the loss can be computed again."""

    loss: float | None

    def holds_nonfinite(self, name: str) -> bool:
        """Whether NaN or Inf is in an array."""
        low, high = self.ranges.get(name, (0.0, 0.0))
        return not (math.isfinite(low) and math.isfinite(high))

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What has been computed of it, by name; see `samples.of_each`."""
        return {}


@dataclass(frozen=True)
class OptimizerFacts:
    """The optimizer as it is now."""

    name: str
    is_adaptive: bool
    """Whether its update is of the size of the learning rate, whatever the gradient's."""

    momentum: float
    weight_decay: float
    lrs: tuple[float, ...]


@dataclass(frozen=True)
class ModelFacts:
    """The model as it is now."""

    modules: tuple[str, ...]
    """Classes of the modules that have no children, in order."""

    n_parameters: int
    """Elements of all its parameters."""

    frozen: tuple[str, ...]
    """Parameters that do not require a gradient."""

    forgotten: tuple[str, ...]
    """Parameters that require a gradient and have one, that are in no group of the optimizer, and
    that nobody else has changed."""

    n_strangers: int
    """Parameters of the optimizer that are not the model's."""

    n_own: int
    """Parameters of the optimizer that are the model's."""

    dropout: float = 0.0
    """Largest probability of a dropout module."""

    has_tables: bool = False
    """Whether it holds a parameter or buffer of its own of several rows, as of positions."""

    @cached_property
    def kinds(self) -> frozenset[str]:
        """Classes of its modules that have no children."""
        return frozenset(self.modules)

    @property
    def normalises(self) -> bool:
        """Whether one of them is a normalisation."""
        return any("Norm" in kind for kind in self.kinds)


class Site(NamedTuple):
    """A place in the model where an activation function was seen, over a window of steps."""

    name: str
    kind: str
    units: int
    dead_units: int
    saturated_fraction: float

    @property
    def is_dead(self) -> bool:
        """Whether no unit has given anything but zero."""
        return 0 < self.units == self.dead_units


@dataclass(frozen=True)
class Evidence:
    """All that is known of a run at one time."""

    step: int
    """Finished optimizer steps."""

    layers: tuple[Layer, ...]
    probes: Probes
    recent_steps: NDArray[np.int64]
    """Numbers of the last recorded steps: (w,)."""

    recent_nonfinite: Floats
    """NaN and Inf in each gradient in those steps: (w, layers); NaN where it is missing beside
    one that holds some."""

    decisions: Floats
    """Decisions on those steps: (w, 6), as `Monitor.decisions`."""

    curves: Mapping[str, Curve] = field(default_factory=dict)
    batches: tuple[Batch, ...] = ()
    optimizer: OptimizerFacts | None = None
    model: ModelFacts | None = None
    sites: tuple[Site, ...] = ()
    first_sites: tuple[Site, ...] = ()
    """The same after the first step."""

    activations_watched: bool = True
    """Whether a model was watched for activations; without, ``sites`` is empty in any case."""

    first_nonfinite: int | None = None
    """The first step known to have had NaN or Inf in its gradients. It may have been one before
    that is neither among the last recorded steps nor among the probes."""

    skipped_steps: int = 0
    accumulation_looks: int = 0
    """Steps whose gradients were compared with those of the step before."""

    accumulated_steps: int = 0
    """Those whose gradients had been added to the older ones."""

    unprobed: str = ""
    """Why no steps are probed any more, where that is so."""

    @cached_property
    def observed(self) -> frozenset[str]:
        """What there is to judge by: names of curves and arrays, ``steps`` and ``activations``."""
        arrays = {
            name
            for batch in self.batches
            for name in ("inputs", "outputs", "targets")
            if getattr(batch, name) is not None
        }
        probed = {"steps"} if len(self.probes.steps) else set()
        activations = {"activations"} if self.sites else set()
        return frozenset(arrays | probed | activations | set(self.curves))

    @cached_property
    def loss(self) -> Curve | None:
        """The training loss, where it was observed."""
        return self.curves.get("loss")

    @cached_property
    def val_loss(self) -> Curve | None:
        """The validation loss, where it was observed."""
        return self.curves.get("val_loss")

    @cached_property
    def dimensions(self) -> NDArray[np.int64]:
        """Number of dimensions of each parameter: (layers,)."""
        return np.array([len(layer.shape) for layer in self.layers], np.int64)

    @cached_property
    def epsilons(self) -> Floats:
        """Distance from 1 to the next number of each parameter's dtype: (layers,)."""
        return np.array([layer.epsilon for layer in self.layers])

    @cached_property
    def recurrent(self) -> list[int]:
        """Positions of the weights that a recurrent network's state is multiplied by."""
        return [i for i, layer in enumerate(self.layers) if "weight_hh" in layer.name]

    @cached_property
    def embeddings(self) -> list[int]:
        """Positions of the tables that rows are picked from.

        Without a model those that have no bias and begin as only tables do, with the deviation of 1
        that torch gives them, where most other matrices begin smaller.
        """
        known = [i for i, layer in enumerate(self.layers) if layer.module in _EMBEDDINGS]
        if self.model is not None or not len(self.probes.steps) or self.probes.steps[0] != 1:
            return known
        is_table = self.dimensions == 2
        with np.errstate(invalid="ignore"):
            is_like_one = is_table & (np.abs(self.probes.first_std - 1.0) < _NEARLY)
        if 2 * is_like_one.sum() >= is_table.sum():
            return known
        shapes = [*(layer.shape for layer in self.layers[1:]), ()]  # of what comes after each
        chosen: list[int] = np.flatnonzero(is_like_one).tolist()
        return [i for i in chosen if shapes[i] != self.layers[i].shape[:1]]

    @cached_property
    def matrices(self) -> NDArray[np.int64]:
        """Positions of the layers that multiply what flows through, in the model's order.

        No bias, no gain of a normalisation.
        """
        are_matrices = self.dimensions >= 2
        are_matrices[self.embeddings] = False
        return np.flatnonzero(are_matrices)


def norms(rows: Floats) -> Floats:
    """Return the norm of each row without what is NaN: (n,)."""
    squares = rows**2
    squares[np.isnan(squares)] = 0.0
    found: Floats = np.sqrt(squares.sum(axis=1))
    return found


def rms(tables: Floats) -> Floats:
    """Return the root mean square of each row over its finite elements; NaN where it is missing."""
    count = tables[..., NUMEL] - tables[..., NANS] - tables[..., INFS]
    with np.errstate(invalid="ignore", divide="ignore"):
        result: Floats = tables[..., L2] / np.sqrt(count)
    return result
