"""`ActivationMonitor`: what it finds, what it calls it, when it looks, and what a window holds."""

from __future__ import annotations

import gc
import math
import weakref

import pytest
import torch
from activation_reference import expected
from torch import Tensor, nn
from torch.nn import functional
from watched_models import (
    SITES,
    Block,
    Calls,
    batch,
    hook_state,
    make_model,
    mode_stack,
    outputs_of,
    seen,
)

import gradstat
from gradstat.activations.calls import ACTIVATIONS
from gradstat.activations.kinds import KINDS


@pytest.fixture(autouse=True)
def _no_mode_is_left():
    yield
    assert mode_stack() == 0


# ---- what is found ------------------------------------------------------------------------------


FORMS = {
    "nn.ReLU": (nn.ReLU(), "relu"),
    "nn.ReLU_inplace": (nn.ReLU(inplace=True), "relu"),
    "nn.ReLU6": (nn.ReLU6(), "relu6"),
    "nn.LeakyReLU": (nn.LeakyReLU(), "leaky_relu"),
    "nn.PReLU": (nn.PReLU(), "prelu"),
    "nn.RReLU": (nn.RReLU(), "rrelu"),
    "nn.ELU": (nn.ELU(), "elu"),
    "nn.SELU": (nn.SELU(), "selu"),
    "nn.CELU": (nn.CELU(), "celu"),
    "nn.GELU": (nn.GELU(), "gelu"),
    "nn.GELU_tanh": (nn.GELU("tanh"), "gelu"),
    "nn.SiLU": (nn.SiLU(), "silu"),
    "nn.Mish": (nn.Mish(), "mish"),
    "nn.Hardswish": (nn.Hardswish(), "hardswish"),
    "nn.Hardtanh": (nn.Hardtanh(), "hardtanh"),
    "nn.Hardsigmoid": (nn.Hardsigmoid(), "hardsigmoid"),
    "nn.Sigmoid": (nn.Sigmoid(), "sigmoid"),
    "nn.LogSigmoid": (nn.LogSigmoid(), "logsigmoid"),
    "nn.Tanh": (nn.Tanh(), "tanh"),
    "nn.Softsign": (nn.Softsign(), "softsign"),
    "nn.Softplus": (nn.Softplus(), "softplus"),
    "nn.Softmax": (nn.Softmax(1), "softmax"),
    "nn.Softmax2d": (nn.Softmax2d(), "softmax"),
    "nn.LogSoftmax": (nn.LogSoftmax(1), "log_softmax"),
    "nn.Threshold": (nn.Threshold(0.1, 0.0), "threshold"),
    "F.relu": (Calls(functional.relu), "relu"),
    "F.relu_": (Calls(lambda x: functional.relu_(x.clone())), "relu"),
    "F.relu6": (Calls(functional.relu6), "relu6"),
    "F.hardtanh_": (Calls(lambda x: functional.hardtanh_(x.clone())), "hardtanh"),
    "F.threshold": (Calls(lambda x: functional.threshold(x, 0.0, 0.0)), "threshold"),
    "F.softmax_without_dim": (Calls(lambda x: functional.softmax(x, dim=1)), "softmax"),
    "nn.Softmin": (nn.Softmin(1), "softmax"),
    "torch.relu": (Calls(torch.relu), "relu"),
    "torch.sigmoid": (Calls(torch.sigmoid), "sigmoid"),
    "torch.selu_": (Calls(lambda x: torch.selu_(x.clone())), "selu"),
    "torch.special.expit": (Calls(torch.special.expit), "sigmoid"),
    "torch.special.softmax": (Calls(lambda x: torch.special.softmax(x, 1)), "softmax"),
    "x.relu": (Calls(lambda x: x.relu()), "relu"),
    "x.relu_": (Calls(lambda x: x.clone().relu_()), "relu"),
    "x.tanh": (Calls(lambda x: x.tanh()), "tanh"),
    "x.sigmoid_": (Calls(lambda x: x.clone().sigmoid_()), "sigmoid"),
    "x.softmax": (Calls(lambda x: x.softmax(dim=1)), "softmax"),
    "x.log_softmax": (Calls(lambda x: x.log_softmax(1)), "log_softmax"),
    "nn.Hardshrink": (nn.Hardshrink(), "hardshrink"),
    "nn.Softshrink": (nn.Softshrink(), "softshrink"),
    "torch.relu_by_name": (Calls(lambda x: torch.relu(input=x)), "relu"),
    "aten.relu": (Calls(torch.ops.aten.relu), "relu"),
    "aten.relu.default": (Calls(torch.ops.aten.relu.default), "relu"),
    "aten.sigmoid_.default": (Calls(lambda x: torch.ops.aten.sigmoid_.default(x * 1)), "sigmoid"),
    "aten.hardtanh.default": (Calls(lambda x: torch.ops.aten.hardtanh(x, 0.0, 6.0)), "relu6"),
    "aten._softmax.default": (Calls(lambda x: torch.ops.aten._softmax(x, 1, False)), "softmax"),
}


FORMS |= {
    f"F.{kind}_in_place": (
        Calls(lambda x, kind=kind: getattr(functional, kind)(x.clone(), inplace=True)),
        kind,
    )
    for kind in (
        "relu", "relu6", "leaky_relu", "rrelu", "elu", "selu", "celu", "silu", "mish",
        "hardswish", "hardtanh", "hardsigmoid",
    )
}  # fmt: skip


@pytest.mark.parametrize(("module", "kind"), FORMS.values(), ids=FORMS)
def test_every_form_of_a_call_is_seen_once(module, kind):
    module = module.eval()  # rrelu
    x = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 3
    table = seen(module, x.clone())
    assert table.names == (f"{kind}#0",)
    row = table[0]
    output = module(x.clone())
    low = 0.0 if kind == "threshold" else None
    assert row.kind == kind
    assert row.units == 3
    assert row.moments.l2 == pytest.approx(output.double().square().sum().sqrt().item(), rel=1e-6)
    if low is None:
        direct = gradstat.activation_stats(output, kind)
        assert row.active_counts.tolist() == direct.active_counts.tolist()
        assert row.saturated_fraction == direct.saturated_fraction


CLAMPS = {
    "torch.clamp": lambda x: torch.clamp(x, min=0),
    "x.clamp": lambda x: x.clamp(0),
    "x.clamp_": lambda x: (x * 1).clamp_(min=0.0),
    "x.clip": lambda x: x.clip(0, None),
    "x.clamp_min": lambda x: x.clamp_min(0),
    "torch.clamp_min_": lambda x: torch.clamp_min_(x * 1, 0),
    "aten.clamp_min.default": lambda x: torch.ops.aten.clamp_min.default(x, 0),
}


@pytest.mark.parametrize("clamp", CLAMPS.values(), ids=CLAMPS)
def test_a_clamp_at_zero_is_a_relu(clamp):
    x = torch.randn(5, 3).requires_grad_()
    row = seen(Calls(clamp), x)["relu#0"]
    assert row.active_counts.tolist() == (x > 0).sum(0).tolist()
    assert len(seen(Calls(clamp), x.detach())) == 0


ARITHMETIC = {
    "other_limit": lambda x: x.clamp(min=1e-6),
    "two_limits": lambda x: x.clamp(0, 1),
    "from_above": lambda x: x.clamp(max=0),
    "tensor": lambda x: x.clamp(min=torch.zeros(())),
    "maximum": lambda x: torch.maximum(x, torch.zeros(3)),
    "parameter": lambda x: x * functional.softplus(nn.Parameter(x)),
    "view_of_a_parameter": lambda x: x * nn.Parameter(x)[:, :1].sigmoid(),
    "large_sparse": lambda x: torch.sparse_coo_tensor(
        torch.zeros(2, 1).long(), x[0, :1], (2**20, 2**20), check_invariants=True
    ).relu(),
    "glu": lambda x: functional.glu(torch.cat([x, x], 1)),
    "tanhshrink": functional.tanhshrink,
    "complex": lambda x: torch.complex(x, x).tanh(),
}


@pytest.mark.parametrize("function", ARITHMETIC.values(), ids=ARITHMETIC)
def test_what_is_documented_as_unseen(function):
    assert len(seen(Calls(function), torch.randn(5, 3).requires_grad_())) == 0


def test_every_kind_but_the_identity_can_be_seen():
    assert {kind.name for kind in ACTIVATIONS.values()} == set(KINDS) - {"identity"}


PARAMETERS = {
    "hardtanh": (nn.Hardtanh(-2.0, 0.5), lambda y: (y <= -2).sum() + (y >= 0.5).sum()),
    "hardtanh_keywords": (
        Calls(lambda x: functional.hardtanh(x, max_val=0.5)),
        lambda y: (y <= -1).sum() + (y >= 0.5).sum(),
    ),
    "elu": (nn.ELU(alpha=2.0), lambda y: (y < -1.98).sum()),
    "elu_of_a_small_alpha": (nn.ELU(alpha=0.01), lambda y: (y < 0).sum()),
    "celu": (nn.CELU(alpha=0.5), lambda y: (y < -0.49).sum()),
    "softplus": (nn.Softplus(beta=3), lambda y: (y < -math.log(0.98) / 3).sum()),
    "leaky_relu": (nn.LeakyReLU(0.02), lambda y: (y < 0).sum()),
    "leaky_relu_that_leaks": (nn.LeakyReLU(0.2), lambda y: (y < -math.inf).sum()),
    "threshold": (nn.Threshold(0.25, -7.0), lambda y: (y == -7).sum()),
    "relu6": (nn.ReLU6(), lambda y: (y >= 6).sum()),
}


@pytest.mark.parametrize(("module", "count"), PARAMETERS.values(), ids=PARAMETERS)
def test_parameters_move_the_bounds(module, count):
    x = torch.randn(400, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 4
    row = seen(module, x)[0]
    assert row.saturated_low + row.saturated_high == int(count(module(x)))


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("bound", [0.3, 0.7, 0.9])
def test_a_limit_is_met_in_every_dtype(bound, dtype):
    x = torch.linspace(-2, 2, 33).to(dtype)[:, None]
    row = seen(nn.Hardtanh(-bound, bound), x)[0]
    assert (row.saturated_low, row.saturated_high) == (int((x < -bound).sum()),) * 2
    direct = gradstat.activation_stats(functional.hardtanh(x, -bound, bound), "hardtanh",
                                       low=-bound, high=bound)  # fmt: skip
    assert (direct.saturated_low, direct.saturated_high) == (row.saturated_low, row.saturated_high)
    row = seen(nn.Threshold(0.0, bound), x)[0]
    assert row.saturated_low == int((x <= 0).sum())


def test_names_tell_module_function_and_call():
    model = make_model()
    table = seen(model, batch(0))
    assert table.names == SITES
    assert [row.kind for row in table] == [name.split("/")[1].split("#")[0] for name in SITES]
    assert [row.weight for row in table][:3] == ["0.weight", "3.first.weight", "3.first.weight"]
    assert table["3/tanh#0"].weight == "3.second.weight"
    assert table["6/softmax#0"].weight is None


def test_numbers_are_those_of_the_outputs():
    model = make_model().eval()
    table = seen(model, batch(0))
    outputs = outputs_of(model, batch(0), (nn.GELU, nn.Softmax))
    for site, name, kind in (("6/softmax#0", "6", "softmax"), ("3.act/gelu#1", "3.act", "gelu")):
        right = expected(kind, outputs[name], -1)
        assert table[site].active_counts.tolist() == right.active_counts
        assert table[site].saturated_fraction == right.saturated_fraction
        assert table[site].moments.l2 == pytest.approx(right.l2, rel=1e-6)


def test_names_stay_the_same_over_steps():
    model = make_model()
    monitor = gradstat.ActivationMonitor(model, every=2, window=8)
    for step in range(20):
        model(batch(step))
        assert monitor.table().names == SITES
    assert monitor.table().steps == 6


def test_a_call_that_is_left_out_now_and_then_keeps_the_other_names():
    class Switch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.skips = False

        def forward(self, x: Tensor) -> Tensor:
            return x if self.skips else functional.relu(x).sigmoid()

    switch = Switch()
    model = nn.Sequential(switch, nn.ReLU())
    monitor = gradstat.ActivationMonitor(model, every=1)
    for switch.skips in (False, True, False):
        model(torch.ones(2, 3))
    table = monitor.table()
    assert table.names == ("0/relu#0", "0/sigmoid#0", "1/relu#0")
    assert [row.samples for row in table] == [4, 4, 6]


def test_a_shared_module_is_told_apart_by_its_calls():
    shared = nn.ReLU()
    model = nn.Sequential(nn.Linear(3, 5), shared, nn.Linear(5, 2), shared)
    table = seen(model, torch.randn(4, 3))
    assert table.names == ("1/relu#0", "1/relu#1")
    assert [row.units for row in table] == [5, 2]
    assert [row.weight for row in table] == ["0.weight", "2.weight"]


# ---- when ---------------------------------------------------------------------------------------


def test_steps_are_calls_until_step_is_called():
    model = nn.Sequential(nn.ReLU())
    monitor = gradstat.ActivationMonitor(model, every=3)

    def samples() -> int:
        return sum(row.samples for row in monitor.table())

    counts = []
    for _ in range(7):
        model(torch.ones(1, 2))
        counts.append(samples())
    assert counts == [1, 1, 1, 2, 2, 2, 3]
    assert monitor.steps == 7


def test_all_calls_of_a_sampled_step_that_record_gradients_are_counted():
    model = nn.Sequential(nn.ReLU())
    monitor = gradstat.ActivationMonitor(model, every=2)
    monitor.count_steps()
    counts = []
    for _ in range(4):
        for _ in range(3):
            model(torch.ones(1, 2))
        with torch.no_grad():
            model(torch.ones(50, 2))  # validation
        monitor.step()
        counts.append(monitor.table()[0].samples)
    assert counts == [3, 3, 6, 6]
    assert (monitor.steps, monitor.table().steps) == (4, 2)


def test_the_window_forgets():
    model = nn.Sequential(nn.ReLU(), nn.Softmax(-1))
    monitor = gradstat.ActivationMonitor(model, every=1, window=4)
    steps, dead = [], []
    for step in range(9):
        x = torch.zeros(1, 2)
        x[0, 0] = 1.0
        x[0, 1] = step == 2
        model(x)
        steps.append(monitor.table().steps)
        dead.append(monitor.table()[0].dead_units)
    assert steps == [1, 2, 3, 4, 3, 4, 3, 4, 3]
    assert dead == [1, 1, 0, 0, 0, 0, 1, 1, 1]
    assert monitor.table()[0].samples == 3
    model(torch.tensor([[100.0, 0.0]]))
    assert monitor.table()[1].saturated_fraction == 0.25


def test_a_site_that_changes_its_units_or_bounds_begins_anew():
    model = nn.Sequential(nn.Hardtanh())
    monitor = gradstat.ActivationMonitor(model, every=1)
    for units in (3, 3, 5):
        model(torch.ones(2, units))
    row = monitor.table()[0]
    assert (row.units, row.samples) == (5, 2)
    model[0].max_val = 2.0
    model(torch.ones(4, 5))
    row = monitor.table()[0]
    assert (row.samples, row.saturated_high) == (4, 0)


@pytest.mark.parametrize("window", [1, 2, 3, 5])
def test_a_short_window_is_kept_too(window):
    model = nn.Sequential(nn.ReLU())
    monitor = gradstat.ActivationMonitor(model, every=1, window=window)
    for _ in range(9):
        model(torch.ones(1, 2))
        table = monitor.table()
        assert table.steps == table[0].samples
    assert (window + 1) // 2 <= table.steps <= window


def test_a_window_of_steps_equals_one_big_batch():
    model = make_model().eval()
    monitor = gradstat.ActivationMonitor(model, every=1, window=20)
    inputs = [batch(step, n) for step, n in enumerate((3, 11, 6, 1))]
    for x in inputs:
        model(x)
    table, whole = monitor.table(), seen(model, torch.cat(inputs))
    assert table.names == whole.names
    for row, right in zip(table, whole, strict=True):
        assert row.active_counts.tolist() == right.active_counts.tolist()
        assert row.low_counts.tolist() == right.low_counts.tolist()
        assert row.saturated_fraction == right.saturated_fraction
        assert row.moments.l2 == pytest.approx(right.moments.l2, rel=1e-6)
        assert row.moments.abs_max == pytest.approx(right.moments.abs_max, rel=1e-6)


def test_a_table_stays_as_it_was_made():
    model = nn.Sequential(nn.ReLU())
    monitor = gradstat.ActivationMonitor(model, every=1, window=1)
    model(torch.ones(1, 2))
    table = monitor.table()
    model(torch.ones(5, 2))
    assert table[0].samples == 1
    assert monitor.table()[0].samples == 5
    assert len(gradstat.ActivationMonitor(model).table()) == 0


# ---- what is kept -------------------------------------------------------------------------------


def test_no_activation_is_kept():
    kept: list[weakref.ref[Tensor]] = []

    class Note(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = functional.relu(x)
            kept.append(weakref.ref(x))
            gone = kept[0]() is None if len(kept) > 1 else True
            assert gone or len(kept) == 1
            return x + 1

    model = nn.Sequential(Note(), Note())
    monitor = gradstat.ActivationMonitor(model, every=1)
    gc.disable()
    try:
        model(torch.ones(3, 2))
        assert [ref() for ref in kept] == [None, None]
    finally:
        gc.enable()
    assert len(monitor.table()) == 2


def test_memory_is_what_is_documented():
    model = nn.Sequential(nn.Linear(4, 500), nn.ReLU())
    monitor = gradstat.ActivationMonitor(model, every=1, window=4)
    for _ in range(12):
        model(torch.ones(3, 4))
    windows = monitor._windows
    held = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for half in (windows._newer, windows._older)
        for tensor in (*half.memory.values(), *(t for w in half.counts.values() for t in w))
    }
    assert sum(held.values()) == 48 * 500 + 192


def test_removal_leaves_everything_as_it_was():
    model = make_model()
    before = hook_state(model)
    monitor = gradstat.ActivationMonitor(model, every=1)
    model(batch(0))
    assert hook_state(model) != before
    monitor.remove()
    monitor.remove()
    assert hook_state(model) == before
    model(batch(1))
    assert monitor.table()["2/relu#0"].samples == 10


def test_text():
    table = seen(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), Block()), torch.ones(3, 4))
    lines = str(table).splitlines()
    assert lines[0].split() == ["site", "units", "dead", "low", "high", "zeros", "mean", "std"]
    assert [line.split()[0] for line in lines[2:]] == list(table.names)
    assert repr(table) == "ActivationTable(7 sites over 1 sampled steps)"
    assert str(gradstat.ActivationMonitor(nn.ReLU()).table()).split()[0] == "site"
    assert repr(gradstat.ActivationMonitor(nn.ReLU())) == "ActivationMonitor(every=10, steps=0)"
    assert "1/relu#0" in table
    assert table.moments.names == table.names
    assert table.moments.kind == "activation"


def test_names_are_fit_to_be_printed():
    hostile = nn.Sequential()
    hostile.add_module("\x1b[31m\ud800", nn.ReLU())
    table = seen(hostile, torch.ones(3, 4))
    assert str(table).splitlines()[2].startswith("?[31m?/relu#0 ")
    assert ">?[31m?/relu#0<" in table._repr_html_()
