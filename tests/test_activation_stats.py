"""`activation_stats`: every kind, layout and dtype against the rules written out in float64."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from activation_reference import REFERENCES, expected
from torch import Tensor

import gradstat
from gradstat import _kernels
from gradstat.activations.kinds import KINDS, Kind

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LAYOUTS = {
    "features": lambda x: (x.reshape(45, 7).contiguous(), 1),
    "tokens": lambda x: (x.reshape(5, 9, 7).contiguous(), -1),
    "channels": lambda x: (x.reshape(3, 5, 3, 7).permute(0, 3, 1, 2).contiguous(), 1),
    "channels_last": lambda x: (
        x.reshape(3, 5, 3, 7).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last), 1),
    "volume_last": lambda x: (
        x.reshape(3, 5, 1, 3, 7).permute(0, 4, 1, 2, 3)
        .contiguous(memory_format=torch.channels_last_3d), 1),
    "units_first": lambda x: (x.reshape(45, 7).t().contiguous(), 0),
    "transposed": lambda x: (x.reshape(45, 7).t(), -2),
    "with_gaps": lambda x: (x.reshape(45, 7).repeat_interleave(2, 0)[::2], 1),
    "one_sample": lambda x: (x.reshape(45, 7)[0], 0),
    "one_element": lambda x: (x.reshape(45, 7)[3, 2:3], -1),
    "expanded": lambda x: (x.reshape(5, 9, 7)[:, :1].expand(5, 9, 7), -1),
    "units_expanded": lambda x: (x.reshape(45, 7)[:, 3:4].expand(45, 6), 1),
    "one_unit": lambda x: (x.reshape(1, 1, 315), -2),
    "long_runs": lambda x: (x.reshape(5, 9, 7).permute(2, 0, 1).repeat(1, 2, 130), -3),
    "odd_strides": lambda x: (x.reshape(5, 9, 7)[1::2, :, 1::3].transpose(0, 2), 1),
    "overlapping": lambda x: (x.reshape(-1).as_strided((30, 7), (3, 2)), 1),
}  # fmt: skip


def output_of(kind: str, dtype: torch.dtype) -> Tensor:
    """Return outputs (45, 7) with zeros, values around the bounds, and units at either end."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(45, 7, generator=generator, dtype=torch.float64) * 4
    x[:, 2] = -x[:, 2].abs() - 30.0
    x[:, 4] = x[:, 4].abs() + 30.0
    x[::5, 1] = 0.0
    x[::9, 5] *= 0.01
    if kind in ("rrelu", "prelu"):
        torch.manual_seed(0)
    return REFERENCES[kind].function(x).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("kind", REFERENCES)
def test_every_kind_layout_and_dtype(kind, layout, dtype):
    x, unit_dim = layout(output_of(kind, dtype))
    stats = gradstat.activation_stats(x, kind, unit_dim)
    right = expected(kind, x, unit_dim)
    assert stats.active_counts.tolist() == right.active_counts
    assert stats.low_counts.tolist() == right.low_counts
    assert stats.high_counts.tolist() == right.high_counts
    assert stats.units == len(right.active_counts)
    assert stats.samples == x.numel() // stats.units
    assert stats.dead_units == right.dead_units
    assert stats.saturated_low == sum(right.low_counts)
    assert stats.saturated_high == sum(right.high_counts)
    assert stats.saturated_fraction == pytest.approx(right.saturated_fraction, rel=1e-12)
    assert stats.zero_fraction == pytest.approx(right.zero_fraction, rel=1e-12)
    assert stats.moments.l2 == pytest.approx(right.l2, rel=1e-6)
    assert stats.moments.mean == pytest.approx(right.mean, rel=1e-6, abs=1e-9)
    assert (stats.moments.rows, stats.moments.dead_rows) == (stats.units, stats.dead_units)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", REFERENCES)
def test_every_value_of_16_bits(kind, dtype):
    x = torch.arange(-32768, 32768).to(torch.int16).view(dtype).view(-1, 256)
    stats, right = gradstat.activation_stats(x, kind), expected(kind, x, 1)
    assert stats.active_counts.tolist() == right.active_counts
    assert stats.low_counts.tolist() == right.low_counts
    assert stats.high_counts.tolist() == right.high_counts


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", REFERENCES)
def test_the_neighbours_of_every_bound(kind, dtype):
    bounds = [
        b for b in KINDS[kind].bounds(*(v for _, v in KINDS[kind].parameters)) if not math.isnan(b)
    ]
    near = torch.tensor([*bounds, 0.0, -0.0, 1.0, -1.0], dtype=torch.float64).to(dtype)
    up, down = (torch.full_like(near, end) for end in (math.inf, -math.inf))
    x = torch.cat([near, near.nextafter(up), near.nextafter(down)])[None]
    stats, right = gradstat.activation_stats(x, kind), expected(kind, x, 1)
    assert stats.active_counts.tolist() == right.active_counts
    assert stats.low_counts.tolist() == right.low_counts
    assert stats.high_counts.tolist() == right.high_counts


def test_the_oracle_covers_every_kind():
    assert set(REFERENCES) == set(KINDS)


CURVED = [kind for kind, reference in REFERENCES.items() if reference.flat is not None]


@pytest.mark.parametrize("kind", CURVED)
def test_a_bound_means_the_derivative_that_is_claimed(kind):
    reference = REFERENCES[kind]
    x = torch.linspace(-40, 40, 400_001, dtype=torch.float64).requires_grad_()
    y = reference.function(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    stats_low = gradstat.activation_stats(y.detach(), kind, 0).low_counts.astype(bool)
    stats_high = gradstat.activation_stats(y.detach(), kind, 0).high_counts.astype(bool)
    saturated = torch.from_numpy(stats_low | stats_high)
    # On the edge of a limit either slope is the derivative, and torch takes the inner one.
    on_an_edge = (slope.abs() > reference.flat) & (
        (y == y.min()) | (y == y.max()) if reference.flat == 0.0 else torch.zeros_like(saturated)
    )
    clear = saturated & (x.abs() > reference.ambiguous) & ~on_an_edge
    assert clear.sum() > 1000
    assert slope[clear].abs().max() <= reference.flat
    assert on_an_edge.sum() <= 2
    if reference.ambiguous:
        mistaken = saturated & (x.abs() <= reference.ambiguous)
        assert 0 < mistaken.sum() <= reference.ambiguous / 80 * 400_001 + 1


def test_dead_is_never_and_not_mostly():
    x = torch.zeros(1000, 4)
    x[::10, 0] = 1.0
    x[999, 1] = 1e-30
    x[:, 2] = -0.0
    stats = gradstat.activation_stats(x)
    assert stats.active_counts.tolist() == [100, 1, 0, 0]
    assert stats.dead_units == 2
    assert stats.dead_fraction == 0.5
    assert stats.saturated_fraction == 0.0
    assert stats.zero_fraction == pytest.approx((4000 - 101) / 4000)


def test_nan_is_in_no_count_and_the_moments_say_so():
    x = torch.tensor([[math.nan, 1.0, math.inf], [math.nan, -1.0, -math.inf]])
    stats = gradstat.activation_stats(x, "tanh")
    assert stats.active_counts.tolist() == [0, 2, 2]
    assert stats.low_counts.tolist() == [0, 1, 1]
    assert stats.high_counts.tolist() == [0, 1, 1]
    assert stats.stuck_units == 2
    assert (stats.moments.nans, stats.moments.infs) == (2, 2)


def test_bounds_of_ones_own():
    y = torch.tensor([[0.05, 0.1, 0.5, 0.9, 0.95]], dtype=torch.float64)
    stats = gradstat.activation_stats(y, "sigmoid", low=0.1, high=0.9)
    assert stats.low_counts.tolist() == [1, 0, 0, 0, 0]
    assert stats.high_counts.tolist() == [0, 0, 0, 0, 1]
    assert stats.active_counts.tolist() == [0, 1, 1, 1, 1]
    closed = gradstat.activation_stats(y, "hardtanh", low=0.1, high=0.9)
    assert closed.low_counts.tolist() == [1, 1, 0, 0, 0]
    assert closed.high_counts.tolist() == [0, 0, 0, 1, 1]


OPEN = {
    "sigmoid": (0.01, 0.99), "tanh": (-0.99, 0.99), "celu": (-0.98, None), "elu": (0.02 - 1, None),
    "leaky_relu": (0.0, None), "softmax": (None, 0.999), "logsigmoid": (None, math.log(0.99)),
    "log_softmax": (None, math.log(0.999)), "softplus": (-math.log1p(-0.02), None),
}  # fmt: skip
CLOSED = {"gelu": (0.0, None), "silu": (0.0, None), "mish": (0.0, None), "relu6": (None, 6.0),
          "hardtanh": (-1.0, 1.0), "hardsigmoid": (0.0, 1.0), "threshold": (0.0, None)}  # fmt: skip


@pytest.mark.parametrize("kind", [*OPEN, *CLOSED])
def test_a_bound_itself_is_saturated_where_the_table_says_so(kind):
    low, high = (OPEN | CLOSED)[kind]
    met = int(kind in CLOSED)
    for bound, counts, beyond in ((low, "low_counts", -math.inf), (high, "high_counts", math.inf)):
        if bound is not None:
            y = torch.tensor([[bound, math.nextafter(bound, beyond)]], dtype=torch.float64)
            beyond_counts = int(kind not in ("gelu", "silu", "mish", "threshold"))
            if not beyond_counts:  # a band, whose other end lies below
                y[0, 1] = math.nextafter(bound, math.inf)
            assert getattr(gradstat.activation_stats(y, kind), counts).tolist() == [
                met,
                beyond_counts,
            ]


@pytest.mark.parametrize("kind", ["hardtanh", "relu6", "tanh"])
def test_the_default_device_is_left_alone(kind):
    y = torch.tensor([[-1.0, 6.0, 0.5]])
    right = gradstat.activation_stats(y, kind).to_dict()
    with torch.device("meta"):
        assert gradstat.activation_stats(y, kind).to_dict() == right
        assert len(gradstat.ActivationMonitor(torch.nn.ReLU()).table().moments) == 0


def test_half_precision_is_compared_as_what_it_is():
    # 0.99 lies between two bf16 numbers, and neither is rounded to it.
    y = torch.tensor([[0.98828125, 0.9921875]], dtype=torch.bfloat16)
    assert gradstat.activation_stats(y, "sigmoid").high_counts.tolist() == [0, 1]


@pytest.mark.parametrize("kind", ["relu", "tanh", "gelu", "softmax"])
def test_a_window_of_batches_equals_one_big_batch(kind):
    batches = [output_of(kind, torch.float32) * scale for scale in (1.0, 0.5, 0.999)]
    rule = KINDS[kind].rule(KINDS[kind].bounds(), torch.float32)
    window = None
    for batch in batches:
        window = _kernels.units(batch, rule, 1, window)
    assert window is not None
    whole = _kernels.units(torch.cat(batches), rule, 1)
    assert torch.equal(window.counts, whole.counts)
    torch.testing.assert_close(window.row, whole.row, rtol=1e-6, atol=0)


def test_the_input_is_neither_changed_nor_kept():
    x = torch.randn(6, 3, requires_grad=True)
    before = x.detach().clone()
    version = x._version
    stats = gradstat.activation_stats(x, "identity")
    assert torch.equal(x, before)
    assert x._version == version
    assert x.grad is None
    import gc

    assert not any(found is stats for found in gc.get_referrers(x))


def test_shapes_without_a_number():
    empty = gradstat.activation_stats(torch.zeros(0, 4))
    assert (empty.units, empty.samples, empty.dead_units, empty.stuck_units) == (4, 0, 0, 0)
    assert math.isnan(empty.saturated_fraction)
    no_units = gradstat.activation_stats(torch.zeros(4, 0))
    assert (no_units.units, no_units.dead_units) == (0, 0)
    scalar = gradstat.activation_stats(torch.tensor(0.0), unit_dim=0)
    assert (scalar.units, scalar.dead_units) == (1, 1)


def test_text_and_dict():
    stats = gradstat.activation_stats(torch.tensor([[0.0, 1.0]]))
    assert repr(stats) == "ActivationStats('relu', 1 of 2 units dead, 0.0% saturated, 50.0% zero)"
    assert stats.to_dict() == {
        "name": "relu",
        "kind": "relu",
        "weight": None,
        "units": 2,
        "samples": 1,
        "dead_units": 1,
        "stuck_units": 0,
        "saturated_low": 0,
        "saturated_high": 0,
        "saturated_fraction": 0.0,
        "zero_fraction": 0.5,
    }


# ---- documentation ------------------------------------------------------------------------------

ACTIVE_WORDS = {
    gradstat.activations.kinds.ActiveRule.POSITIVE: "y > 0",
    gradstat.activations.kinds.ActiveRule.NONZERO: "y != 0",
    gradstat.activations.kinds.ActiveRule.NOT_LOW: "not low",
}


def documented_row(kind: Kind) -> str:
    cells = (kind.low, kind.high, kind.derivative, kind.source)
    return f"| `{kind.name}` | {ACTIVE_WORDS[kind.active]} | {' | '.join(cells)} |"


def test_documentation_holds_the_table_of_kinds():
    text = (Path(__file__).parents[1] / "docs" / "activations.md").read_text()
    rows = re.findall(r"^\| `\w+` \|(?:[^|\n]*\|){5}$", text, re.MULTILINE)
    assert rows == [documented_row(kind) for kind in KINDS.values()]
