"""The texts of errors of check, lr_range_test and noise_scale."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from messages import assert_words_in_order, message_of
from torch import nn

import gradstat
from gradstat import (
    ArgumentTypeError,
    ArgumentValueError,
)

INF, NAN = math.inf, math.nan


NET = nn.Linear(3, 2)
SGD = torch.optim.SGD(NET.parameters(), lr=0.1)
PAIR = (torch.ones(8, 3), torch.zeros(8, dtype=torch.long))
CE = nn.functional.cross_entropy


class Uncopyable(nn.Linear):
    def __deepcopy__(self, memo: Any) -> Any:
        raise RuntimeError("no copies")


def with_old_weight_norm() -> nn.Module:
    with pytest.warns(FutureWarning, match="weight_norm"):
        return nn.utils.weight_norm(nn.Linear(3, 2))


BAD_PROBES: dict[str, tuple[Callable[[], object], type[Exception], list[str]]] = {
    "no_model": (
        lambda: gradstat.check("net", CE, PAIR),
        ArgumentTypeError,
        ["model must be a torch.nn.Module", "got str"],
    ),
    "lazy_model": (
        lambda: gradstat.check(nn.LazyLinear(2), CE, PAIR),
        ArgumentTypeError,
        ["model must have parameters with values", "got those of a lazy module", "run one batch"],
    ),
    "no_loss": (
        lambda: gradstat.check(NET, batch=PAIR),
        ArgumentValueError,
        ["one of loss_fn and step must be given", "got neither", "pass loss_fn(outputs, targets)"],
    ),
    "two_losses": (
        lambda: gradstat.check(NET, CE, PAIR, step=CE),
        ArgumentValueError,
        ["one of loss_fn and step must be given", "got both"],
    ),
    "loss_no_function": (
        lambda: gradstat.check(NET, "ce", PAIR),
        ArgumentTypeError,
        ["loss_fn must be a function", "got str", "torch.nn.CrossEntropyLoss()"],
    ),
    "no_batch": (
        lambda: gradstat.check(NET, CE),
        ArgumentValueError,
        ["batch must hold tensors", "got NoneType", "next(iter(loader))"],
    ),
    "inputs_alone": (
        lambda: gradstat.check(NET, CE, PAIR[0]),
        ArgumentTypeError,
        ["batch must be (inputs, targets) for loss_fn", "got Tensor", "pass step="],
    ),
    "loss_as_number": (
        lambda: gradstat.check(NET, lambda o, t: CE(o, t).item(), PAIR),
        ArgumentTypeError,
        ["the loss must be a tensor", "got float", "without .item()"],
    ),
    "loss_of_each_row": (
        lambda: gradstat.check(NET, lambda o, t: CE(o, t, reduction="none"), PAIR),
        ArgumentValueError,
        ["the loss must be one number", "got a tensor of shape (8,)", "loss.mean()"],
    ),
    "batch_dim": (
        lambda: gradstat.check(NET, CE, PAIR, batch_dim="rows"),
        ArgumentTypeError,
        ["batch_dim must be an int", "got str", "use 0"],
    ),
    "overfit_steps": (
        lambda: gradstat.check(NET, CE, PAIR, overfit_steps=-1),
        ArgumentValueError,
        ["overfit_steps must be at least 0", "got -1"],
    ),
    "no_copies": (
        lambda: gradstat.check(Uncopyable(3, 2), CE, PAIR),
        ArgumentTypeError,
        ["must be fit for copy.deepcopy", "got RuntimeError: no copies", "keep tensors with"],
    ),
    "weight_norm": (
        lambda: gradstat.check(with_old_weight_norm(), CE, PAIR),
        ArgumentTypeError,
        ["must be fit for copy.deepcopy", "use those of torch.nn.utils.parametrizations"],
    ),
    "no_optimizer": (
        lambda: gradstat.lr_range_test(NET, NET, CE, [PAIR]),
        ArgumentTypeError,
        ["optimizer must be a torch.optim.Optimizer", "got Linear"],
    ),
    "optimizer_of_another_model": (
        lambda: gradstat.lr_range_test(nn.Linear(3, 2), SGD, CE, [PAIR]),
        ArgumentValueError,
        ["optimizer must hold parameters of model", "got a SGD with none"],
    ),
    "no_loader": (
        lambda: gradstat.lr_range_test(NET, SGD, CE, 5),
        ArgumentTypeError,
        ["loader must give batches", "got int", "pass a DataLoader"],
    ),
    "empty_loader": (
        lambda: gradstat.lr_range_test(NET, SGD, CE, []),
        ArgumentValueError,
        ["loader must give batches", "got none"],
    ),
    "few_steps": (
        lambda: gradstat.lr_range_test(NET, SGD, CE, [PAIR], steps=3),
        ArgumentValueError,
        ["steps must be at least 10", "got 3"],
    ),
    "start_after_end": (
        lambda: gradstat.lr_range_test(NET, SGD, CE, [PAIR], start=1.0, end=0.1),
        ArgumentValueError,
        ["start must be positive and less than end", "got start=1.0 and end=0.1"],
    ),
    "start_word": (
        lambda: gradstat.lr_range_test(NET, SGD, CE, [PAIR], start="low"),
        ArgumentTypeError,
        ["start must be a number", "got str"],
    ),
    "splits_one": (
        lambda: gradstat.noise_scale(NET, CE, PAIR, splits=1),
        ArgumentValueError,
        ["splits must be at least 2", "got 1"],
    ),
    "more_splits_than_rows": (
        lambda: gradstat.noise_scale(NET, CE, PAIR, splits=9),
        ArgumentValueError,
        ["batch must hold tensors with at least splits=9 rows", "got 8 rows", "fewer splits"],
    ),
    "frozen": (
        lambda: gradstat.noise_scale(nn.Linear(3, 2).requires_grad_(False), CE, PAIR),
        ArgumentValueError,
        ["model must have parameters that require a gradient", "got none"],
    ),
    "sizes_alike": (
        lambda: gradstat.NoiseScale.from_norms(1.0, 1.0, 32, 32),
        ArgumentValueError,
        ["small_size must be positive and less than big_size", "got 32 and 32"],
    ),
}


@pytest.mark.parametrize(("call", "error", "words"), BAD_PROBES.values(), ids=BAD_PROBES)
def test_probes(call, error, words):
    assert_words_in_order(message_of(error, call), words)
