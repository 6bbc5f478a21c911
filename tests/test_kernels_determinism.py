"""Equal input gives equal bits: across threads, runs and flush-to-zero modes; and which variant."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from kernel_calls import (
    CPU_VARIANTS,
    DTYPES,
    assert_same_values,
    assert_table,
    bits_of,
    run_moments,
    sample,
    scale_in_place,
)
from torch import Tensor

from gradstat import _native

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@functools.cache
def many_tensors() -> list[Tensor]:
    dtypes = list(DTYPES.values())
    sizes = [200_000, 1, 70_000, 0, 65_536, 4097, 131_073, *range(300)]
    return [sample(n, dtypes[i % 4], seed=i) for i, n in enumerate(sizes)]


def results(tensors: list[Tensor], threads: int) -> list[Tensor]:
    result = run_moments(tensors, threads=threads, histogram=True, max_norm=0.5)
    clip = torch.tensor([result.norm, result.coefficient], dtype=torch.float64)
    return [bits_of(result.table), result.histogram, bits_of(clip)]


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_and_runs_give_equal_bits(cpu_variant, threads):
    expected = results(many_tensors(), 1)
    for _ in range(3):
        for got, want in zip(results(many_tensors(), threads), expected, strict=True):
            assert torch.equal(got, want)


def test_a_tensor_gives_equal_bits_wherever_it_stands(cpu_variant):
    tensor = sample(150_000, torch.float32)
    alone = run_moments([tensor]).table[0]
    moved = torch.empty(150_001)[1:].copy_(tensor)
    among = run_moments([torch.ones(7), moved, torch.ones(200_000)], threads=2).table[1]
    assert torch.equal(alone, among)


@pytest.fixture
def flush_denormal() -> Iterator[None]:
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor has no flush-to-zero mode that torch can set")
    torch.set_flush_denormal(False)
    yield
    torch.set_flush_denormal(False)


SUBNORMAL = {
    "fp64": (torch.float64, 5e-324),
    "fp64-1e-310": (torch.float64, 1e-310),
    "fp64-2^-600": (torch.float64, 2.0**-600),
    "fp32": (torch.float32, 1e-45),
    "bf16": (torch.bfloat16, 9.2e-41),
    "fp16": (torch.float16, 6e-8),
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("dtype", "value"), SUBNORMAL.values(), ids=SUBNORMAL)
def test_flush_to_zero_changes_no_result(cpu_variant, flush_denormal, dtype, value, threads):
    tensors = [torch.full((n,), value, dtype=torch.float64).to(dtype) for n in (3, 100, 300_000)]
    tensors[1][:50] *= 3
    scaled = [tensor.clone() for tensor in tensors]
    expected = results(tensors, threads)
    torch.set_flush_denormal(True)
    flushed = results(tensors, threads)
    scale_in_place(scaled, 3.0, threads)
    torch.set_flush_denormal(False)
    for got, want in zip(flushed, expected, strict=True):
        assert torch.equal(got, want)
    assert_table(run_moments(tensors).table, tensors)
    for tensor, original in zip(scaled, tensors, strict=True):
        assert_same_values(tensor, original * 3)


def test_the_callers_flush_to_zero_mode_comes_back(flush_denormal):
    smallest = torch.tensor([5e-324], dtype=torch.float64)
    torch.set_flush_denormal(True)
    run_moments([smallest])
    scale_in_place([smallest.clone()], 3.0)
    product = smallest * 1
    torch.set_flush_denormal(False)
    assert product.item() == 0.0


def test_variants_agree_on_everything_but_the_order_of_sums():
    tables = []
    for name in (name for name, runs_here in CPU_VARIANTS.items() if runs_here):
        _native.use_cpu_variant(name)
        assert _native.cpu_variant() == name
        assert _native.cpu_variant_reason() == "set by use_variant"
        tables.append(run_moments(many_tensors(), histogram=True))
    _native.use_cpu_variant("")
    for result in tables:
        assert_table(result.table, many_tensors(), tables[0].table.numpy())
        assert torch.equal(result.histogram, tables[0].histogram)


def test_an_empty_name_returns_to_the_default():
    _native.use_cpu_variant("scalar")
    _native.use_cpu_variant("")
    if not os.environ.get("GRADSTAT_CPU"):
        assert _native.cpu_variant() == next(name for name, runs in CPU_VARIANTS.items() if runs)


def test_an_unknown_variant_is_refused():
    usable = ", ".join(name for name, runs_here in CPU_VARIANTS.items() if runs_here)
    with pytest.raises(ValueError, match="name must name a CPU variant") as error:
        _native.use_cpu_variant("mmx")
    assert f"got 'mmx'; use one of: {usable}" in str(error.value)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_environment_variable_chooses_the_variant():
    code = (
        "import torch, gradstat, gradstat._native as n; gradstat.tensor_stats([torch.ones(3)]); "
        "print(n.cpu_variant(), n.cpu_variant_reason(), sep=': ')"
    )
    done = run_python(code, GRADSTAT_CPU="scalar")
    assert done.stdout.strip() == "scalar: set by GRADSTAT_CPU", done.stderr


def test_the_environment_variable_must_name_a_variant():
    code = "import torch, gradstat; gradstat.tensor_stats([torch.ones(3)])"
    done = run_python(code, GRADSTAT_CPU="mmx")
    assert done.returncode == 1
    assert "ValueError: GRADSTAT_CPU must name a CPU variant that runs here, got 'mmx'" in (
        done.stderr
    )


def test_threads_are_those_of_torch_whatever_was_loaded_first():
    # scikit-learn brings a libgomp of its own; a second pool would fight torch's for the cores.
    code = """
import sklearn.ensemble, torch, gradstat, ctypes
own = ctypes.CDLL(torch._C.__file__.rpartition("/")[0] + "/lib/libtorch_cpu.so").GOMP_parallel
print(gradstat.get_config().thread_source)
print(own is not None)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    source, own = done.stdout.split("\n")[:2]
    torch_library = Path(torch.__file__).parent / "lib"
    assert own == "True"
    assert source.startswith("OpenMP (")
    names = {path.name for path in torch_library.glob("lib*omp*")}
    assert source[len("OpenMP (") : -1] in names
