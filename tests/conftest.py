"""What every test may use: the needs_cuda marker and the CPU variants, forced one by one."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator

import pytest
import torch
from kernel_calls import CPU_VARIANTS

from gradstat import _native


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("needs_cuda") is None:
        return
    missing = _what_cuda_lacks()
    if missing:
        if os.environ.get("FAIL_WITHOUT_CUDA") == "1":
            pytest.fail(f"FAIL_WITHOUT_CUDA=1, but {missing}", pytrace=False)
        pytest.skip(missing)


def _what_cuda_lacks() -> str:
    if not _native.cuda_is_built():
        return f"gradstat has no CUDA kernels: {_native.cuda_reason}"
    with warnings.catch_warnings():
        # A CUDA edition of torch warns where it finds no driver.
        warnings.simplefilter("ignore")
        return "" if torch.cuda.is_available() else "torch finds no CUDA device"


@pytest.fixture(params=list(CPU_VARIANTS))
def cpu_variant(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each CPU variant in turn, in use for the test; the default one comes back afterwards."""
    if not CPU_VARIANTS[request.param]:
        pytest.skip(f"this processor does not run {request.param}")
    _native.use_cpu_variant(request.param)
    yield request.param
    _native.use_cpu_variant("")


@pytest.fixture(scope="module")
def one_torch_thread() -> Iterator[None]:
    """Torch on one thread: on a busy machine its waiting threads cost more than they bring."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
