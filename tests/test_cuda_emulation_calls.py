"""What else the CUDA kernels' own sources do, run on the CPU: lists, clipping, devices."""

from __future__ import annotations

import itertools
import math

import pytest
import reference
import torch
from cuda_emulation.emulator import (
    MISSING,
    EmulationError,
    Emulator,
    TensorRef,
    load_emulator,
    with_specials,
)
from kernel_calls import (
    DTYPES,
    assert_same_values,
    assert_table,
    bits_of,
    guarded,
    sample,
    scale_in_place,
)
from torch import Tensor

TOLERANCE = 1e-6  # the contract's
DTYPE = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
SEEDS = (0, 1, 2)
CHUNK = 65536


@pytest.fixture(scope="module")
def cuda() -> Emulator:
    return load_emulator()


# ---- lists of tensors ----------------------------------------------------------------------------


def test_missing_and_empty_tensors(cuda):
    full = sample(10, torch.float32)
    empty = [torch.empty(0), torch.empty(5, 0), torch.empty(0, 3, dtype=torch.float64)]
    lists: list[list[Tensor | None]] = [
        [],
        [None],
        [None, None, None],
        empty,
        [None, full, *empty, full, None],
        [full, None],
    ]
    for tensors, seed in itertools.product(lists, SEEDS):
        result = cuda.moments(tensors, histogram=True, seed=seed)
        assert_table(result.table, tensors, tolerance=TOLERANCE)
        assert (result.histogram.numpy() == reference.histogram(tensors)).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_thousands_of_tensors_take_several_launches(cuda, seed):
    sizes = [*range(40), 70_000, 3]
    pool: list[Tensor | None] = [sample(n, torch.float32, seed=n) for n in sizes]
    pool += [None, sample(12, torch.float64), torch.zeros(4, 6).t(), sample(77, torch.bfloat16)]
    # Missing ones take their place in a launch too, and no time here.
    tensors = [pool[i // 8 % len(pool)] if i % 8 == 0 else None for i in range(4000)]
    cuda.history()
    result = cuda.moments(tensors, histogram=True, max_norm=1.0, seed=seed)
    assert cuda.history()["launches"] == 4  # three batches, and the interleaved tensors
    assert_table(result.table, tensors, tolerance=TOLERANCE)
    assert (result.histogram.numpy() == reference.histogram(tensors)).all()
    norm = reference.norm(tensors, 2)
    assert result.norm == pytest.approx(norm, rel=TOLERANCE)
    assert result.coefficient == pytest.approx(reference.clip_coefficient(norm, 1.0), rel=1e-5)


def test_a_model_takes_one_launch(cuda):
    cuda.history()
    tensors = [torch.ones(3) if i % 100 == 0 else None for i in range(1600)]
    cuda.moments(tensors)
    cuda.scale(tensors, 0.5)
    assert cuda.history()["launches"] == 2


def test_hundreds_of_interleaved_tensors(cuda):
    tensor = torch.zeros(3, 2)
    tensor[0, 1] = 1
    tensors = [tensor.t()] * 600
    table = cuda.moments(tensors).table
    assert_table(table, tensors, tolerance=TOLERANCE)
    assert table[-1, reference.COLUMNS.index("dead_rows")] == 600


def test_packing_of_any_size(cuda):
    def described(*numbers: int) -> TensorRef:
        return TensorRef(0x7FFF_DEAD_BEE0, *numbers)

    giant = 5_000_000_000
    kinds = [
        described(giant, 1, giant, 2),
        described(giant, giant, 1, 1),
        described(giant, 50_000, 100_000, 0),
        described(giant, 3, giant // 1000, 3),  # interleaved
        described(0, 2**33, 0, 0),
        described(12, 3, 4, 0),
        TensorRef(None, MISSING, 0, 0, 0),
        described(70_000, 7, 10_000, 0),
    ]
    for kind in kinds:
        assert cuda.packing([kind]) == 1
    assert cuda.packing(kinds) == 1
    assert cuda.packing([]) == 0
    small = [kinds[5], kinds[6]]
    assert cuda.packing(small * 800) == 1
    assert cuda.packing(small * 801) == 2
    wide = [described(24, 3, 4, 0), kinds[4]]
    assert cuda.packing(wide * 266) == 1
    assert cuda.packing(wide * 267) == 2
    assert cuda.packing((small + wide) * 2000) == 10


# ---- clipping ------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_kind", [1, 2, 3])
@pytest.mark.parametrize("special", [(), (math.nan,), (math.inf,), (math.nan, math.inf)], ids=str)
def test_clip_coefficient(cuda, norm_kind, special):
    tensors = [sample(50, torch.float32), sample(99_000, torch.bfloat16), torch.tensor(special)]
    order = {1: 1.0, 2: 2.0, 3: math.inf}[norm_kind]
    norm = reference.norm(tensors, order)
    for max_norm in (0.0, 1.0, 1e9, math.inf):
        result = cuda.moments(tensors, max_norm=max_norm, norm_kind=norm_kind)
        assert result.norm == pytest.approx(norm, rel=TOLERANCE, nan_ok=True)
        expected = reference.clip_coefficient(norm, max_norm)
        assert result.coefficient == pytest.approx(expected, rel=2 * TOLERANCE)


@DTYPE
@pytest.mark.parametrize("coefficient", [0.5, 0.3, 1e-3, 1e-40, 0.0, 1.0, math.nan, -2.0, 1e30])
def test_scale(cuda, dtype, coefficient):
    for offset in (0, 1, 3) if coefficient == 0.3 else (0,):
        sources = [
            with_specials(sample(n, dtype, seed=n), (3, 77, 70_000))
            for n in (0, 1, 5, 8, 100, 2500, CHUNK + 9)
        ]
        copies = [guarded(source, offset) for source in sources]
        on_cpu = [source.clone() for source in sources]
        cuda.scale([view for _, view in copies], coefficient, seed=offset)
        scale_in_place(on_cpu, coefficient)
        for source, (buffer, view), same in zip(sources, copies, on_cpu, strict=True):
            assert_same_values(view, reference.scale(source, coefficient))
            assert_same_values(view, same)
            assert buffer[:offset].isnan().all()
            assert buffer[offset + len(view) :].isnan().all()


def test_scale_with_one_coefficient_a_tensor(cuda):
    coefficients = [(0.25, 1.0, 0.0, math.nan, 3.0)[i % 5] for i in range(2000)]
    dtypes = list(DTYPES.values())
    sources = [sample(i % 30, dtypes[i % 4], seed=i) for i in range(2000)]
    listed: list[Tensor | None] = [source.clone() for source in sources]
    listed[7] = None
    cuda.scale(listed, coefficients)
    for source, scaled, coefficient in zip(sources, listed, coefficients, strict=True):
        if scaled is not None:
            assert_same_values(scaled, reference.scale(source, coefficient))


@DTYPE
@pytest.mark.parametrize("limit", [0.0, 1e-3, 0.3, 1.0, 1e30, math.inf])
def test_clamp(cuda, dtype, limit):
    for offset in (0, 1, 3) if limit == 0.3 else (0,):
        source = with_specials(sample(CHUNK + 99, dtype), (5, 10, 15))
        _, view = guarded(source, offset)
        cuda.clamp([None, view, view[:0]], limit, seed=offset)
        assert_same_values(view, reference.clamp(source, limit))


def test_every_value_of_16_bits(cuda):
    every = torch.arange(-(2**15), 2**15).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        source = every.view(dtype)
        scaled = source.clone()
        cuda.scale([scaled], 1 / 3)
        assert_same_values(scaled, reference.scale(source, 1 / 3))
        cuda.scale([kept := source.clone()], 1.0)
        assert torch.equal(bits_of(kept), every)
        result = cuda.moments([source], histogram=True)
        assert_table(result.table, [source], tolerance=TOLERANCE)
        assert (result.histogram.numpy() == reference.histogram([source])).all()


# ---- devices, and the emulation itself -----------------------------------------------------------


def test_the_current_device_stays(cuda):
    cuda.history()
    tensor = torch.ones(3)
    cuda.moments([tensor], device=0)
    history = cuda.history()
    assert (history["launch_device"], history["set_device_calls"]) == (0, 0)
    for call in (
        lambda: cuda.moments([tensor], device=1),
        lambda: cuda.scale([tensor], 0.5, device=1),
        lambda: cuda.clamp([tensor], 0.1, device=1),
    ):
        call()
        history = cuda.history()
        assert (history["launch_device"], history["current_device"]) == (1, 0)
        assert history["set_device_calls"] == 2
    with pytest.raises(EmulationError, match="CUDA must not fail in cudaSetDevice"):
        cuda.moments([tensor], device=7)
    assert cuda.history()["current_device"] == 0


def test_device_count(cuda):
    assert cuda.device_count(devices=3, driver=13000) == (3, "")
    assert cuda.device_count(devices=0, driver=13000) == (0, "no CUDA device is visible")
    assert cuda.device_count(devices=0, driver=0) == (0, "no CUDA driver is installed")


def test_the_emulation_finds_a_barrier_that_threads_miss(cuda):
    cuda.barrier(64)
    for threads in (1, 32, 63):
        with pytest.raises(EmulationError, match="threads wait at a barrier that others miss"):
            cuda.barrier(threads)
    cuda.barrier(64, seed=2)
