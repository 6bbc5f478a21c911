"""The kernels on a CUDA device: bandwidth, clipping, host time, launches, synchronisation."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from bench_units import DTYPE, RULE, SHAPE, sides
from float64_checks import check_clipping, check_histogram, check_not_clipping, check_table
from pairing import Clock, Pair, Reading, Run, Side
from torch.nn import Parameter
from workload import FallingLimit, count_bytes, gradients, parameters

import gradstat

pytestmark = pytest.mark.needs_cuda

Compare = Callable[[Pair, Clock], None]
Keep = Callable[[Reading, Run], None]

DEVICE = "cuda"
GIB = 2**30
# At about 2 GHz, 10 ms: longer than the host needs to enqueue any of the calls.
HEAD_START_CYCLES = 20_000_000
LONG_CYCLES = 400_000_000


def device_clock(run: Run) -> float:
    """Return the seconds that the device needs for what one call enqueues.

    The device starts late, so that everything is enqueued by then and the host's time is hidden.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(HEAD_START_CYCLES)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def enqueue_clock(run: Run) -> float:
    """Return the seconds of host time of one call on an idle device."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@pytest.fixture(autouse=True)
def give_memory_back() -> Iterator[None]:
    yield
    torch.cuda.empty_cache()


def large(n_bytes: int, dtype: torch.dtype) -> list[Parameter]:
    """Return 64 parameters of that many bytes together, or skip where they do not fit."""
    # Parameters, gradients, the flat tensor beside them, and what the checks need for one of them.
    free, _ = torch.cuda.mem_get_info()
    if free < 3.3 * n_bytes:
        pytest.skip(f"needs {3.3 * n_bytes / GIB:.1f} GiB of free device memory")
    rows = n_bytes // (64 * 4096 * dtype.itemsize)
    return parameters([(rows, 4096)] * 64, dtype, DEVICE)


def flat_read(n_bytes: int) -> Side:
    """Return the read peak: as many bytes as one flat fp32 tensor."""
    flat = torch.empty(n_bytes // 4, device=DEVICE).uniform_()
    return Side("torch.sum of as many bytes", flat.sum, n_bytes)


LARGE = pytest.mark.parametrize(
    ("gib", "dtype"),
    [(gib, dtype) for gib in (1, 4) for dtype in (torch.float32, torch.bfloat16)],
    ids=["1 GiB fp32", "1 GiB bf16", "4 GiB fp32", "4 GiB bf16"],
)


@LARGE
def bench_large_tensors(
    request: pytest.FixtureRequest, gib: int, dtype: torch.dtype, compare: Compare
) -> None:
    params = large(gib * GIB, dtype)
    check_table(gradstat.grad_stats(params), gradients(params))
    read = flat_read(gib * GIB)
    compare(
        Pair(
            f"grad_stats, {request.node.callspec.id} in 64 tensors",
            ours=Side("grad_stats", lambda: gradstat.grad_stats(params), gib * GIB),
            against=read,
            read=read,
            target=1 / 0.85,
        ),
        device_clock,
    )


# In 0.3 s a side: sixteen of them, and one command runs all of this file in 150 s.
@pytest.mark.benchmark(max_time=0.3)
@pytest.mark.parametrize("against", ["reading", "torch operations"])
@RULE
@DTYPE
@SHAPE
def bench_units(
    shape: tuple[int, ...], dtype: torch.dtype, rule: str, against: str, compare: Compare
) -> None:
    work, ours, torchs, _ = sides(shape, dtype, rule, DEVICE)
    read = flat_read(ours.n_bytes)
    if against == "reading":
        pair = Pair(work, ours, read, read, target=1.15)
    else:
        pair = Pair(work, ours, torchs, read, target=0.25)
    compare(pair, device_clock)


def bench_histogram(compare: Compare) -> None:
    params = large(GIB, torch.float32)
    table = gradstat.grad_stats(params, histogram=True)
    check_table(table, gradients(params))
    check_histogram(table)
    compare(
        Pair(
            "grad_stats with histogram, 1 GiB fp32 in 64 tensors",
            ours=Side("grad_stats", lambda: gradstat.grad_stats(params, histogram=True), GIB),
            against=Side("grad_stats without", lambda: gradstat.grad_stats(params), GIB),
            read=flat_read(GIB),
        ),
        device_clock,
    )


@pytest.mark.parametrize("operation", ["torch.sum fp32", "torch.sum int32", "copy"])
def bench_ceiling(operation: str, keep: Keep) -> None:
    n_bytes = 4 * GIB
    flat = torch.empty(n_bytes // 4, device=DEVICE).uniform_()
    integers = flat.view(torch.int32)
    run, moved = {
        "torch.sum fp32": (flat.sum, n_bytes),
        "torch.sum int32": (integers.sum, n_bytes),
        "copy": (flat.clone, 2 * n_bytes),
    }[operation]
    device_clock(run)
    seconds = statistics.median(device_clock(run) for _ in range(20))
    note = "bytes read and bytes written" if operation == "copy" else "bytes read"
    keep(Reading(f"{operation}, 4 GiB", moved / seconds / 1e9, "GB/s", note=note), run)


BILLIONS = [(1250, 4000)] * 300


def bench_clip_grad_norm_that_does_not_clip(compare: Compare) -> None:
    params = parameters(BILLIONS, torch.bfloat16, DEVICE)
    max_norm = 2 * check_not_clipping(params)
    n_bytes = count_bytes(params)
    compare(
        Pair(
            "clip_grad_norm_ that does not clip, 1.5B bf16 in 300 tensors",
            ours=Side(
                "clip_grad_norm_", lambda: gradstat.clip_grad_norm_(params, max_norm), n_bytes
            ),
            against=Side(
                "torch clip_grad_norm_",
                lambda: torch.nn.utils.clip_grad_norm_(params, max_norm),
                3 * n_bytes,
            ),
            read=flat_read(n_bytes),
            target=0.40,
        ),
        device_clock,
    )


def bench_clip_grad_norm_that_clips(compare: Compare) -> None:
    params = parameters(BILLIONS, torch.bfloat16, DEVICE)
    limit = FallingLimit(check_clipping(params), factor=0.95)
    n_bytes = 3 * count_bytes(params)
    compare(
        Pair(
            "clip_grad_norm_ that clips, 1.5B bf16 in 300 tensors",
            ours=Side(
                "clip_grad_norm_", lambda: limit.clip(gradstat.clip_grad_norm_, params), n_bytes
            ),
            against=Side(
                "torch clip_grad_norm_",
                lambda: limit.clip(torch.nn.utils.clip_grad_norm_, params),
                n_bytes,
            ),
            read=flat_read(n_bytes),
        ),
        device_clock,
    )
    limit.check()


MANY = [(64,)] * 2000


@pytest.mark.parametrize("function", ["clip_grad_norm_", "grad_stats"])
def bench_host_time(function: str, compare: Compare) -> None:
    params = parameters(MANY, device=DEVICE)
    check_table(gradstat.grad_stats(params), gradients(params))
    run = calls(params)[function]
    compare(
        Pair(
            f"host time of {function}, 2000 x 64 fp32",
            ours=Side(function, run, count_bytes(params)),
            against=Side(
                "torch clip_grad_norm_",
                lambda: torch.nn.utils.clip_grad_norm_(params, 1e6),
                3 * count_bytes(params),
            ),
            target=0.15,
        ),
        enqueue_clock,
    )


def calls(params: list[Parameter]) -> dict[str, Run]:
    """Return the public functions, ready to be called on these parameters."""
    grads = gradients(params)
    return {
        "grad_stats": lambda: gradstat.grad_stats(params),
        "grad_stats with histogram": lambda: gradstat.grad_stats(params, histogram=True),
        "get_total_norm": lambda: gradstat.get_total_norm(grads),
        "clip_grad_norm_": lambda: gradstat.clip_grad_norm_(params, 1e6),
        "clip_grad_value_": lambda: gradstat.clip_grad_value_(params, 1.0),
    }


@pytest.mark.parametrize("count", [300, 2000])
@pytest.mark.parametrize("function", ["grad_stats", "clip_grad_norm_"])
def bench_launches(function: str, count: int, keep: Keep) -> None:
    params = parameters(MANY[:count], device=DEVICE)
    run = calls(params)[function]
    one = torch.ones(8, device=DEVICE)
    if not device_operations(one.sum):
        pytest.skip("the profiler sees no kernels on this machine")
    names = device_operations(run)
    note = "; ".join(f"{name[:60]}" for name in names)
    work = f"launches of {function}, {count} tensors"
    keep(Reading(work, len(names), "kernels, copies and fills", at_most=2, note=note), run)


def device_operations(run: Run) -> list[str]:
    """Return the names of the kernels, copies and fills that one call enqueues."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    for _ in range(2):  # the first profile of a process may miss its first kernels
        torch.cuda.synchronize()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with torch.profiler.profile(activities=activities, acc_events=True) as profile:
                run()
                torch.cuda.synchronize()
            events = profile.events()
    on_device = torch.autograd.DeviceType.CUDA
    return [event.name for event in events or [] if event.device_type == on_device]


def bench_synchronisations(keep: Keep) -> None:
    functions = calls(parameters(MANY, device=DEVICE))
    waiting = [name for name, run in functions.items() if host_waits(run)]
    reading = Reading(
        f"host synchronisations of {len(functions)} functions, 2000 tensors",
        len(waiting),
        "functions that wait",
        at_most=0,
        note=", ".join(waiting),
    )
    keep(reading, functions["clip_grad_norm_"])


def host_waits(run: Run) -> bool:
    """Return whether a call waits for the device, by torch's check and by a busy device."""
    run()  # the first call loads kernels
    torch.cuda.synchronize()
    torch.cuda._sleep(LONG_CYCLES)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch calls the check a prototype
            torch.cuda.set_sync_debug_mode("error")
        run()
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    done = torch.cuda.Event()
    done.record()
    waited = done.query()
    torch.cuda.synchronize()
    return waited
