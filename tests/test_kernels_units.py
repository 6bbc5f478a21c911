"""Counts of each unit of an activation: every variant, dtype and layout against the oracle."""

from __future__ import annotations

import math

import pytest
import reference
import torch
from kernel_calls import APPROXIMATE, DTYPES, TOLERANCE, sample
from torch import Tensor

from gradstat import _fallback
from gradstat._kernels import units
from gradstat._units import ActiveRule, UnitCounts, UnitRule
from gradstat.errors import ArgumentTypeError, ArgumentValueError, UnsupportedTensorError

pytestmark = pytest.mark.usefixtures("one_torch_thread")
DTYPE = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)

NAMES = {
    ActiveRule.POSITIVE: "positive",
    ActiveRule.NONZERO: "nonzero",
    ActiveRule.NOT_LOW: "not-low",
}
RULES = {
    "relu": UnitRule(ActiveRule.POSITIVE),
    "sparse": UnitRule(ActiveRule.NONZERO),
    "relu6": UnitRule(ActiveRule.POSITIVE, -math.inf, 0.0, 6.0),
    "sigmoid": UnitRule(ActiveRule.NOT_LOW, -math.inf, 0.01, 0.99),
    "tanh": UnitRule(ActiveRule.NONZERO, -math.inf, -0.99, 0.99),
    "dead-zone": UnitRule(ActiveRule.NOT_LOW, -0.02, 0.0),
    "nothing-low": UnitRule(ActiveRule.NOT_LOW),
    "softmax": UnitRule(ActiveRule.POSITIVE, high_from=0.999),
}


def assert_counts(
    window: UnitCounts, rule: UnitRule, tensors: list[Tensor], unit_dim: int = 1
) -> None:
    """Check a window against the oracle over these activations."""
    active, low_from, low_to, high_from = rule
    expected = sum(
        reference.unit_counts(t, unit_dim, NAMES[active], (low_from, low_to), high_from)
        for t in tensors
    )
    assert window.counts.dtype == torch.int64
    assert window.counts.tolist() == expected.tolist()
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    want = reference.unit_row(flat, window.counts.shape[1])
    assert window.row.dtype == torch.float64
    for name, got, wanted in zip(reference.COLUMNS, window.row.tolist(), want, strict=True):
        scale = want[reference.COLUMNS.index("abs_sum")] if name == "sum" else wanted
        allowed = TOLERANCE[flat.dtype] * scale if name in APPROXIMATE else 0
        # A sum whose magnitudes leave the range of fp64 has no bound.
        close = got == wanted or scale == math.inf or abs(got - wanted) <= allowed + math.ulp(0.0)
        assert close, name


def activation(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Values of both signs around every bound, a fifth of them zero; each unit has its share."""
    n = math.prod(shape)
    draws = torch.rand(2, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    values = torch.where(draws[1] < 0.2, 0.0, draws[0] * 9 - 2)
    if len(shape) > 1 and shape[1] > 1:
        values = values.view(shape)
        share = torch.arange(shape[1]).view(-1, *[1] * (len(shape) - 2)) / shape[1]
        values = torch.where(draws[1].view(shape) < share, -values.abs(), values)
    return values.reshape(shape).to(dtype)


# Around the lanes, the rows of 4096 elements, long runs (512) and the chunks (65536).
SHAPES = [
    (7, 1), (9, 2), (5, 3), (2, 64), (300, 64), (33, 1000), (3, 4095), (5, 4096), (4, 4097),
    (2, 70_001), (65_537, 1), (40_000, 3), (6, 5, 3), (64, 64, 1), (9, 64, 16), (17, 64, 17),
    (8, 64, 49), (3, 1000, 49), (20, 2, 511), (20, 3, 512), (5, 1, 513), (4, 7, 3136),
    (2, 3, 70_000), (1, 5, 3), (1, 1, 1),
]  # fmt: skip


@DTYPE
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_contiguous_activations(cpu_variant, dtype, shape):
    tensor = activation(shape, dtype)
    for rule in (RULES["relu"], RULES["sigmoid"], RULES["tanh"]):
        assert_counts(units(tensor, rule, 1), rule, [tensor])


def layouts() -> dict[str, tuple[Tensor, int]]:
    image = activation((6, 5, 7, 9), torch.float32)
    deep = activation((2, 16, 40, 33), torch.float32)
    tokens = activation((4, 31, 24), torch.float32)
    return {
        "channels-first": (image, 1),
        "channels-last": (image.to(memory_format=torch.channels_last), 1),
        "channels-last-long": (deep.to(memory_format=torch.channels_last), 1),
        "unit-dim-0": (image, 0),
        "unit-dim-2": (image, 2),
        "unit-dim-last": (image, -1),
        "permuted-3210": (image.permute(3, 2, 1, 0), 1),
        "permuted-2031": (image.permute(2, 0, 3, 1), 3),
        "tokens-last": (tokens, -1),
        "tokens-middle": (tokens, 1),
        "tokens-transposed": (tokens.transpose(1, 2), 1),
        "transposed": (activation((30, 20), torch.float32).t(), 1),
        "vector": (activation((100,), torch.float32), 0),
        "gaps": (image[:, :, ::2], 1),
        "overlaps": (image[:1].expand(6, -1, -1, -1), 1),
        "negated": (torch._neg_view(image), 1),
        "offset": (image.flatten()[3:].view(-1, 17), 1),
    }


@pytest.mark.parametrize("layout", layouts())
@DTYPE
def test_layouts(cpu_variant, dtype, layout):
    tensor, unit_dim = layouts()[layout]
    if layout not in ("gaps", "overlaps", "negated", "offset"):
        tensor = tensor.to(dtype)
    for rule in RULES.values():
        assert_counts(units(tensor, rule, unit_dim), rule, [tensor], unit_dim)


@DTYPE
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_special_values(cpu_variant, dtype, rule):
    info = torch.finfo(dtype)
    special = [
        math.nan, math.inf, -math.inf, 0.0, -0.0, info.max, info.min, info.tiny, -info.tiny,
        info.smallest_normal / 4, -info.smallest_normal / 4, 6.0, 0.99, 0.01, -0.99, -0.02, 0.999,
    ]  # fmt: skip
    for shape in ((70, 3), (9, 64, 49), (3, 2, 5000), (2, 5000)):
        tensor = activation(shape, dtype)
        count = tensor.numel() // 5
        tensor.view(-1)[::5][:count] = (
            torch.tensor(special, dtype=torch.float64)
            .repeat(count // len(special) + 1)[:count]
            .to(dtype)
        )
        tensor[0] = math.nan
        assert_counts(units(tensor, rule, 1), rule, [tensor])


@DTYPE
@pytest.mark.parametrize("shape", [(70, 300), (9, 4, 3136)], ids=str)
def test_nan_of_either_sign_is_in_no_band(cpu_variant, dtype, shape):
    tensor = activation(shape, dtype).abs()
    for place, sign in ((5, 1.0), (1000, -1.0), (4097, 1.0), (9999, -1.0)):
        tensor.view(-1)[place] = math.copysign(math.nan, sign)
    for rule in RULES.values():
        assert_counts(units(tensor, rule, 1), rule, [tensor])


@DTYPE
@pytest.mark.parametrize("shape", [(70, 300), (9, 4, 3136)], ids=str)
def test_the_first_negative_value_or_zero_may_come_late(cpu_variant, dtype, shape):
    tensor = activation(shape, dtype).abs().clamp(min=0.004)
    for place, value in ((3000, 0.0), (9999, -1.5)):
        tensor.view(-1)[place] = value
        for rule in (RULES["relu"], RULES["sigmoid"], RULES["tanh"]):
            assert_counts(units(tensor, rule, 1), rule, [tensor])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_every_16_bit_value(cpu_variant, dtype):
    tensor = torch.arange(-32768, 32768).to(torch.int16).view(dtype).view(-1, 64)
    for rule in RULES.values():
        assert_counts(units(tensor, rule, 1), rule, [tensor])


@DTYPE
def test_bounds_are_not_rounded(cpu_variant, dtype):
    neighbours = torch.tensor([-0.5, 0.0, 0.5, 1.0], dtype=dtype).repeat(40, 1)
    beyond = math.nextafter(0.5, 1.0)  # no value of the narrower dtypes
    rules = [
        UnitRule(ActiveRule.NOT_LOW, -0.5, 0.0, 0.5),
        UnitRule(ActiveRule.NOT_LOW, math.nextafter(-0.5, 0.0), 0.5, beyond),
        UnitRule(ActiveRule.NOT_LOW, -math.nextafter(0.5, 1.0), math.nextafter(0.5, 0.0), 1.0),
        UnitRule(ActiveRule.NONZERO, 0.0, 0.0, math.nextafter(1.0, 2.0)),
        UnitRule(ActiveRule.NONZERO, -1e-320, 1e-320, 5e-324),
        UnitRule(ActiveRule.NONZERO, -1e300, -1e-300, -1e300),
        UnitRule(ActiveRule.POSITIVE, -math.inf, math.inf, -math.inf),
        UnitRule(ActiveRule.POSITIVE, math.inf, math.inf, math.inf),
        UnitRule(ActiveRule.NOT_LOW, math.nan, 1.0, 0.0),
        UnitRule(ActiveRule.NOT_LOW, 0.5, -0.5),
    ]
    for rule in rules:
        assert_counts(units(neighbours, rule, 1), rule, [neighbours])


@DTYPE
@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1.0, 1e30])
def test_the_range_of_the_moments(cpu_variant, dtype, scale):
    tensor = (activation((70, 100), torch.float64) * scale).clamp(-6e4, 6e4).to(dtype)
    if dtype == torch.float16 and scale != 1.0:
        pytest.skip("fp16 has no such values")
    assert_counts(units(tensor, RULES["tanh"], 1), RULES["tanh"], [tensor])


@DTYPE
@pytest.mark.parametrize("shape", [(90, 3), (40, 64, 49), (7, 3, 900)], ids=str)
def test_a_window_equals_one_big_batch(cpu_variant, dtype, shape):
    tensor = activation(shape, dtype)
    for rule in RULES.values():
        window = None
        for batch in tensor.split((shape[0] + 2) // 3):
            window = units(batch, rule, 1, window)
        assert_counts(window, rule, [tensor])
        assert torch.equal(window.counts, units(tensor, rule, 1).counts)


def test_a_window_of_zeros_and_of_empty_batches(cpu_variant):
    rule = RULES["sigmoid"]
    window = units(torch.empty(0, 5), rule, 1)
    assert window.counts.tolist() == [[0] * 5] * 3
    assert window.row.tolist() == [*[0.0] * 9, 5.0, 0.0, 0.0]
    tensor = activation((8, 5), torch.float32)
    for batch in (torch.zeros(3, 5), tensor, torch.empty(0, 5), torch.full((2, 5), math.nan)):
        units(batch, rule, 1, window)
    everything = [torch.zeros(3, 5), tensor, torch.full((2, 5), math.nan)]
    assert_counts(window, rule, everything)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (2, 0, 4), (0,)], ids=str)
def test_nothing(cpu_variant, shape):
    window = units(torch.empty(shape), RULES["sparse"], -1)
    assert window.counts.tolist() == [[0] * shape[-1]] * 3
    assert window.row[0] == 0


@pytest.mark.parametrize("unit_dim", [0, -1])
def test_a_scalar_is_one_unit(cpu_variant, unit_dim):
    window = units(torch.tensor(7.0), RULES["relu6"], unit_dim)
    assert window.counts.tolist() == [[1], [0], [1]]


@DTYPE
@pytest.mark.parametrize("shape", [(1000, 300), (90, 64, 49), (9, 5, 9000), (3, 150_000)], ids=str)
def test_threads_change_no_bit(cpu_variant, dtype, shape):
    tensor = activation(shape, dtype)
    torch.set_num_threads(2)
    two = units(tensor, RULES["sigmoid"], 1)
    torch.set_num_threads(1)
    one = units(tensor, RULES["sigmoid"], 1)
    assert torch.equal(one.counts, two.counts)
    assert torch.equal(one.row.view(torch.int64), two.row.view(torch.int64))


def test_another_order_of_units_would_be_seen():
    tensor = activation((6, 5, 3, 7), torch.float32)
    for other in (0, 2, 3):
        swapped = tensor.transpose(1, other).contiguous().view(tensor.shape)
        window = units(swapped, RULES["sigmoid"], 1)
        with pytest.raises(AssertionError):
            assert_counts(window, RULES["sigmoid"], [tensor])
    window = units(tensor, RULES["sigmoid"], 1)
    with pytest.raises(AssertionError):
        assert_counts(UnitCounts(window.counts.flip(1), window.row), RULES["sigmoid"], [tensor])


def test_the_activation_stays(cpu_variant):
    tensor = sample(5000, torch.float32).view(50, 100).requires_grad_()
    before, version = tensor.detach().clone(), tensor._version
    window = units(tensor, RULES["sigmoid"], 1)
    assert torch.equal(tensor.detach(), before)
    assert tensor._version == version
    assert not window.counts.requires_grad


# ---- arguments ----------------------------------------------------------------------------------


@pytest.mark.parametrize("unit_dim", [2, -3, 100])
def test_a_dimension_that_is_not_there(unit_dim):
    with pytest.raises(ArgumentValueError, match=r"unit_dim must be a dimension of encoder\.2"):
        units(torch.zeros(2, 3), RULES["relu"], unit_dim, name="encoder.2")


def test_a_window_of_other_units():
    window = units(torch.zeros(2, 3), RULES["relu"], 1)
    with pytest.raises(ArgumentValueError, match="as many units as the window .* 3, got 2"):
        units(torch.zeros(2, 3), RULES["relu"], 0, window)


@pytest.mark.parametrize(
    ("tensor", "error"),
    [
        pytest.param([1.0], ArgumentTypeError, id="a-list"),
        pytest.param(torch.zeros(3, 2, dtype=torch.int64), UnsupportedTensorError, id="integers"),
        pytest.param(torch.zeros(3, 2, device="meta"), UnsupportedTensorError, id="meta"),
    ],
)
def test_what_holds_no_numbers_is_refused_by_name(tensor, error):
    with pytest.raises(error, match=r"encoder\.2"):
        units(tensor, RULES["relu"], 0, name="encoder.2")


def test_a_sparse_activation_counts_its_zeros():
    dense = torch.tensor([[0.0, 2.0, 0.0], [0.0, -1.0, 3.0]])
    window = units(dense.to_sparse(), RULES["dead-zone"], 1)
    assert_counts(window, RULES["dead-zone"], [dense])


# ---- devices without a kernel --------------------------------------------------------------------


@DTYPE
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_plain_torch_operations_count_the_same(dtype, rule):
    tensor = activation((30, 4, 5), dtype)
    tensor[0, 1, :3] = torch.tensor([math.nan, math.inf, -math.inf])
    window = units(tensor, rule, 1)
    for batch in (tensor, tensor[:0]):
        _fallback.units(batch.movedim(1, 0), rule, window)
    assert_counts(window, rule, [tensor, tensor])
