"""What is said of arguments that activations cannot do with."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn

import gradstat
from gradstat import ArgumentTypeError, ArgumentValueError, LayerNotFoundError

X = torch.ones(2, 3)
MODEL = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch.jit is deprecated
    SCRIPTED = torch.jit.script(MODEL)


def attach(**options: object) -> object:
    optimizer = torch.optim.SGD(MODEL.parameters(), lr=0.1)
    return gradstat.attach(optimizer, **options)  # type: ignore[arg-type]


BAD: dict[str, tuple[Callable[[], object], type[Exception], list[str]]] = {
    "kind_unknown": (
        lambda: gradstat.activation_stats(X, "relo"), ArgumentValueError,
        ["kind must be one of relu, relu6,", "got 'relo'", 'kind="identity" saturates nowhere']),
    "kind_no_str": (
        lambda: gradstat.activation_stats(X, nn.ReLU()), ArgumentTypeError,
        ["kind must be a str, got ReLU", 'kind="relu"']),
    "x_no_tensor": (
        lambda: gradstat.activation_stats([1.0]), ArgumentTypeError,
        ["must be a torch.Tensor, got list for x"]),
    "x_int": (
        lambda: gradstat.activation_stats(X.long()), gradstat.UnsupportedTensorError,
        ["got dtype torch.int64 for x", "pass tensor.float()"]),
    "x_complex": (
        lambda: gradstat.activation_stats(X.to(torch.complex64)), gradstat.UnsupportedTensorError,
        ["must hold real numbers, got dtype torch.complex64 for x", "pass x.abs()"]),
    "unit_dim_of_another_shape": (
        lambda: gradstat.activation_stats(X[0]), ArgumentValueError,
        ["unit_dim must be a dimension of x, which has shape (3,), got 1; use -1"]),
    "unit_dim_out_of_range": (
        lambda: gradstat.activation_stats(X, unit_dim=2), ArgumentValueError,
        ["unit_dim must be a dimension of x, which has shape (2, 3), got 2"]),
    "unit_dim_no_int": (
        lambda: gradstat.activation_stats(X, unit_dim=1.0), ArgumentTypeError,
        ["unit_dim must be an int, got float"]),
    "low_no_number": (
        lambda: gradstat.activation_stats(X, "sigmoid", low="0"), ArgumentTypeError,
        ["low must be a number, got str", "kind='sigmoid'"]),
    "high_nan": (
        lambda: gradstat.activation_stats(X, "sigmoid", high=math.nan), ArgumentValueError,
        ["low must lie below high and neither be NaN, got low=None and high=nan"]),
    "bounds_out_of_order": (
        lambda: gradstat.activation_stats(X, "tanh", low=0.5, high=0.5), ArgumentValueError,
        ["low must lie below high", "got low=0.5 and high=0.5"]),
    "bounds_that_overlap": (
        lambda: gradstat.activation_stats(X, "sigmoid", high=0.005), ArgumentValueError,
        ["low and high must leave room between them, got low=None and high=0.005",
         "own bounds are y < 0.01 and y > 0.99; pass both"]),
    "limits_that_overlap": (
        lambda: gradstat.activation_stats(X, "hardtanh", low=1.0), ArgumentValueError,
        ["got low=1.0 and high=None for kind='hardtanh'"]),
    "low_of_a_band": (
        lambda: gradstat.activation_stats(X, "gelu", low=-1.0), ArgumentValueError,
        ["low must be left out for kind='gelu'", "-0.0069 <= y <= 0", "got low=-1.0"]),
    "model_no_module": (
        lambda: gradstat.ActivationMonitor(X), ArgumentTypeError,
        ["model must be a torch.nn.Module, got Tensor", "activation_stats(x)"]),
    "model_scripted": (
        lambda: gradstat.ActivationMonitor(SCRIPTED), ArgumentTypeError,
        ["model must be a module that runs in Python, got RecursiveScriptModule",
         "watch a plain module that calls it"]),
    "every": (
        lambda: gradstat.ActivationMonitor(MODEL, every=0), ArgumentValueError,
        ["every must be a whole number of at least 1, got 0; use every=1 or more"]),
    "window": (
        lambda: gradstat.ActivationMonitor(MODEL, window=True), ArgumentValueError,
        ["window must be a whole number of at least 1, got True"]),
    "monitor_unit_dim": (
        lambda: gradstat.ActivationMonitor(MODEL, unit_dim="1"), ArgumentTypeError,
        ["unit_dim must be an int or None, got str"]),
    "attach_type": (
        lambda: attach(model=MODEL, activations=10), ArgumentTypeError,
        ["activations must be True, False or a dict of options, got int", '{"every": 20}']),
    "attach_option": (
        lambda: attach(model=MODEL, activations={"evry": 2}), ArgumentValueError,
        ["activations must hold options out of every, window, unit_dim, attention; got 'evry'"]),
    "attach_without_model": (
        lambda: attach(activations=True), ArgumentValueError,
        ["activations must come with model, got model=None"]),
    "dead_units_not_asked_for": (
        lambda: attach(model=MODEL, activations=False).gradstat.dead_units, ArgumentValueError,
        ["activations must be asked for", "activations=True"]),
}  # fmt: skip


@pytest.mark.parametrize(("call", "error", "words"), BAD.values(), ids=BAD)
def test_bad_arguments(call, error, words):
    hooks = len(MODEL._forward_pre_hooks)
    with pytest.raises(error) as caught:
        call()
    assert isinstance(caught.value, gradstat.GradstatError)
    text, place = str(caught.value), 0
    for word in words:
        assert word in text[place:], text
        place = text.index(word, place)
    assert len(MODEL._forward_pre_hooks) == hooks


def test_rows_that_a_table_does_not_have():
    with gradstat.ActivationMonitor(MODEL) as monitor:
        MODEL(X[:, :2])
    table = monitor.table()
    with pytest.raises(
        LayerNotFoundError, match=r"no row named '1/rel#0'; did you mean '1/relu#0'"
    ):
        table["1/rel#0"]
    with pytest.raises(LayerNotFoundError, match=r"within the table's 1 rows, got 1"):
        table[1]
    with pytest.raises(ArgumentTypeError, match=r"by name or index, got float"):
        table[0.5]
    assert table[-1].name == table[0].name == "1/relu#0"


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is:DeprecationWarning")
def test_a_watched_model_is_not_scripted():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    optimizer = gradstat.attach(torch.optim.SGD(model.parameters(), lr=0.1), model)
    with pytest.raises(gradstat.GradstatError) as caught:
        torch.jit.script(model)
    for words in ("must not be watched", "script it before", "gradstat.activations.remove()"):
        assert words in str(caught.value)
    hooks = model._forward_hooks.values()
    assert [getattr(hook, "__name__", "none") for hook in hooks] == ["none"]
    optimizer.gradstat.activations.remove()
    scripted = torch.jit.script(model)
    assert torch.equal(scripted(X), model(X))
