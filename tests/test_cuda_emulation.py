"""The CUDA kernels' own sources, run on the CPU by `cuda_emulation`, against the oracles.

Not covered: the compilation by nvcc, the visibility of memory between blocks, and speed. With
`CUDA_EMULATION_FLAGS="-fsanitize=address,undefined -fno-sanitize-recover=all"` and libasan preloaded
(see `make sanitize`) every access of the kernels is checked too.
"""

from __future__ import annotations

import itertools
import math
import os
import shutil
import sys

import pytest
import reference
import torch
from cuda_emulation.emulator import MISSING, EmulationError, Emulator, TensorRef, build
from kernel_calls import (
    DTYPES,
    assert_same_values,
    assert_table,
    bits_of,
    guarded,
    run_moments,
    sample,
    scale_in_place,
)
from torch import Tensor

TOLERANCE = 1e-6  # the contract's
DTYPE = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
SEEDS = (0, 1, 2)
CHUNK = 65536

# Around a 16-byte vector, a block's turn of vectors, four turns, and a chunk.
LENGTHS = (
    0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 511, 513, 1023, 1025, 2047, 2048, 2049, 4099,
    8191, 8193, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 77,
)  # fmt: skip


@pytest.fixture(scope="module")
def cuda(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    compiler = shutil.which("g++")
    if compiler is None or sys.platform != "linux":
        pytest.skip("the emulation of CUDA needs Linux and g++")
    flags = os.environ.get("CUDA_EMULATION_FLAGS", "").split()
    return Emulator(build(compiler, tmp_path_factory.mktemp("cuda_emulation"), flags))


def same_bits(first: Tensor, second: Tensor) -> bool:
    return torch.equal(first.view(torch.int64), second.view(torch.int64))


def with_specials(tensor: Tensor, positions: tuple[int, ...]) -> Tensor:
    for position, value in zip(positions, itertools.cycle((math.nan, math.inf, -math.inf))):
        if position < tensor.numel():
            tensor.view(-1)[position] = value
    return tensor


# ---- moments -------------------------------------------------------------------------------------


@DTYPE
def test_lengths(cuda, dtype):
    tensors = [sample(length, dtype, seed=length) for length in LENGTHS]
    assert_table(cuda.moments(tensors).table, tensors, tolerance=TOLERANCE)


@DTYPE
@pytest.mark.parametrize("special", [False, True], ids=["finite", "special"])
def test_alignment_changes_no_bit(cuda, dtype, special):
    tables = []
    positions = (0, 5, 2047, 2048, 8000, 8191, 8192) if special else ()
    for offset in range(16 // dtype.itemsize):
        tensors = []
        for length in (1, 7, 8, 9, 100, 2048, 8200, CHUNK + 33):
            values = with_specials(sample(length, dtype, seed=length), positions)
            tensors.append(guarded(values, offset)[1])
        tables.append(cuda.moments(tensors).table)
        assert_table(tables[-1], tensors, tolerance=TOLERANCE)
    assert all(same_bits(table, tables[0]) for table in tables)


@DTYPE
def test_order_of_blocks_and_threads_changes_no_bit(cuda, dtype):
    tensors: list[Tensor | None] = [sample(n, dtype, seed=n) for n in (3, 1000, 5 * CHUNK + 5)]
    tensors += [None, sample(200_000, dtype).view(2, -1), torch.zeros(3, 70_000, dtype=dtype)]
    tensors += [torch.zeros(400, 200, dtype=dtype), torch.zeros(30, 40, dtype=dtype).t()]
    results = [cuda.moments(tensors, histogram=True, seed=seed) for seed in SEEDS]
    assert_table(results[0].table, tensors, tolerance=TOLERANCE)
    for result in results[1:]:
        assert same_bits(result.table, results[0].table)
        assert torch.equal(result.histogram, results[0].histogram)


RANGES = {
    "fp32-subnormals": (torch.float32, [1.5e-45, -3e-45, 1e-40, -1.17e-38, 0.0]),
    "fp32-1e-30": (torch.float32, [1e-30, -2e-30]),
    "fp32-1e30": (torch.float32, [1e30, -2e30]),
    "fp32-largest": (torch.float32, [3e38, -3.4028234663852886e38]),
    "fp32-group-limits": (torch.float32, [2.0**-54, 0.0, 2.0**-54 * (1 - 2.0**-24)]),
    "fp32-upper-group-limits": (torch.float32, [2.0**60, 1.0, 2.0**60 * (1 - 2.0**-24)]),
    "fp32-all": (torch.float32, [1.5e-45, 1e-30, -1.0, 1e25, -3e38]),
    "fp64-subnormals": (torch.float64, [5e-324, -1e-323, 1e-310, 0.0]),
    "fp64-1e-300": (torch.float64, [1e-300, -2e-300]),
    "fp64-1e300": (torch.float64, [1e300, -2e300]),
    "fp64-range-limits": (torch.float64, [2.0**-450, 2.0**-450 * (1 - 2.0**-50), 0.0]),
    "fp64-upper-range-limits": (torch.float64, [2.0**480, 2.0**480 * (1 - 2.0**-50), 0.0]),
    "fp64-largest": (torch.float64, [1.7976931348623157e308, -1e308]),
    "fp64-all": (torch.float64, [5e-324, 1e-300, -1.0, 1e155, -1e300]),
    "fp64-beyond-fp32": (torch.float64, [1e-46, 1e39, -1e-39, 3.5e38]),
    "fp16-subnormals": (torch.float16, [6e-8, -1.2e-7, 6.09e-5]),
    "fp16-all": (torch.float16, [6e-8, -1.0, 65504.0, 0.0]),
    "bf16-subnormals": (torch.bfloat16, [9.2e-41, -1e-39]),
    "bf16-group-limits": (torch.bfloat16, [2.0**-54, 0.0, 2.0**-54 * (1 - 2.0**-8)]),
    "bf16-upper-group-limits": (torch.bfloat16, [2.0**60, 1.0, 2.0**60 * (1 - 2.0**-8)]),
    "bf16-largest": (torch.bfloat16, [3.39e38, -3e38]),
    "bf16-all": (torch.bfloat16, [9.2e-41, 1e-20, -1.0, 1e20, 3.39e38]),
}


@pytest.mark.parametrize(("dtype", "values"), RANGES.values(), ids=RANGES)
def test_range(cuda, dtype, values):
    repeated = torch.tensor(values, dtype=torch.float64).to(dtype).repeat(3000)
    tensors = [repeated[: len(values)], repeated[:1000], repeated, repeated[:8192].sort()[0]]
    result = cuda.moments(tensors, histogram=True)
    assert_table(result.table, tensors, tolerance=TOLERANCE)
    assert (result.histogram.numpy() == reference.histogram(tensors)).all()


@DTYPE
def test_special_values_at_every_position(cuda, dtype):
    tensors = []
    for length in (1, 9, 40, 2048 + 5, CHUNK + 9):
        for position in (0, 1, 7, 8, 39, 2047, 2048, 2052, CHUNK - 1, CHUNK, CHUNK + 8):
            if position < length:
                tensors.append(with_specials(sample(length, dtype), (position,)))
    tensors += [torch.full((n,), v, dtype=dtype) for n in (3, 99) for v in (math.nan, -math.inf)]
    result = cuda.moments(tensors, histogram=True)
    assert_table(result.table, tensors, tolerance=TOLERANCE)
    assert (result.histogram.numpy() == reference.histogram(tensors)).all()


@DTYPE
def test_fp32_sums_of_neighbours_keep_the_bound(cuda, dtype):
    # The worst case: values of all significant bits whose partial sums round each time.
    generator = torch.Generator().manual_seed(1)
    values = (1 + torch.rand(100_000, generator=generator, dtype=torch.float64)).to(dtype)
    tensors = [values, -values, (values * 1.99), torch.cat([values, -values]).sort()[0]]
    assert_table(cuda.moments(tensors).table, tensors, tolerance=TOLERANCE)


def test_counts_and_extremes_equal_the_cpu_kernels(cuda):
    tensors = [sample(n, dtype, seed=n) for dtype in DTYPES.values() for n in (50, 9000, 140_000)]
    ours = cuda.moments(tensors, histogram=True)
    theirs = run_moments(tensors, histogram=True)
    exact = [reference.COLUMNS.index(c) for c in ("zeros", "abs_max", "abs_min", "dead_rows")]
    assert torch.equal(ours.table[:, exact], theirs.table[:, exact])
    assert torch.equal(ours.histogram, theirs.histogram)


# ---- rows ----------------------------------------------------------------------------------------

# Rows around a thread's probe of 32 elements, a chunk, and a row of several chunks.
SHAPES = [
    (1,), (5,), (70_000,), (1, 1), (7, 1), (70_000, 1), (3000, 2), (40, 8), (99, 31), (99, 32),
    (99, 33), (64, 1000), (700, 100), (2, 65_536), (3, 65_537), (2, 200_000), (9, 70_001),
    (64, 32, 3, 3), (300, 768),
]  # fmt: skip


def with_dead_rows(tensor: Tensor) -> Tensor:
    """Kill every third row and the last one; leave others a single living element."""
    tensor[2::3] = 0
    tensor[-1] = -0.0
    if tensor.dim() > 1 and tensor.shape[0] > 4:
        tensor[1] = 0
        tensor[1].view(-1)[-1] = 1
        tensor[3] = 0
        tensor[3].view(-1)[tensor[3].numel() // 2] = -1
        tensor[4].view(-1)[0] = 0
    return tensor


@DTYPE
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dead_rows(cuda, dtype, shape):
    for offset in (0, 3):
        tensor = guarded(sample(math.prod(shape), dtype), offset)[1].view(shape)
        tensors = [with_dead_rows(tensor), torch.zeros_like(tensor), torch.ones_like(tensor)]
        assert_table(cuda.moments(tensors, seed=offset).table, tensors, tolerance=TOLERANCE)


def interleaved() -> dict[str, Tensor]:
    image = with_dead_rows(sample(6 * 4 * 5 * 7, torch.float32).view(6, 4, 5, 7))
    matrix = sample(600 * 300, torch.float32).view(600, 300)
    matrix[:, 7] = 0
    matrix[:, 299] = -0.0
    tall = torch.zeros(3, 900)
    tall[2, 899] = math.nan
    return {
        "transposed": sample(35, torch.float32).view(5, 7).t(),
        "transposed-dead": matrix.t(),
        "transposed-tall": tall.t(),
        "long-rows": tall.t().contiguous().t(),
        "channels-last": image.to(memory_format=torch.channels_last),
        "permuted-1023": image.permute(1, 0, 2, 3),
        "permuted-3210": image.permute(3, 2, 1, 0),
        "permuted-2031": image.permute(2, 0, 3, 1),
        "zeros-transposed": torch.zeros(300, 500).t(),
    }


@pytest.mark.parametrize("tensor", interleaved().values(), ids=interleaved())
def test_interleaved_rows(cuda, tensor):
    beside = torch.zeros(3, 4)
    tensors = [tensor, beside, tensor.double(), tensor.bfloat16(), tensor.half(), None]
    for seed in SEEDS:
        table = cuda.moments(tensors, seed=seed).table
        assert_table(table, tensors, tolerance=TOLERANCE)


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
    assert cuda.packing(small * 812) == 1
    assert cuda.packing(small * 813) == 2
    wide = [described(24, 3, 4, 0), kinds[4]]
    assert cuda.packing(wide * 270) == 1
    assert cuda.packing(wide * 271) == 2
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
