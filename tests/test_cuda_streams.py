"""How the CUDA kernels run on a device: streams, graphs, several devices, 5 billion elements."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import reference
import torch
from cuda_calls import CUDA, TOLERANCE, assert_near, on_device, parameters
from kernel_calls import assert_table, bits_of, sample
from torch import Tensor

import gradstat
from gradstat import _native

pytestmark = pytest.mark.needs_cuda


@contextmanager
def no_synchronisation() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls the mode a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- streams, graphs, devices --------------------------------------------------------------------


def calls(listed: list[torch.nn.Parameter]) -> dict[str, Callable[[], object]]:
    return {
        "grad_stats": lambda: gradstat.grad_stats(listed).data,
        "histogram": lambda: gradstat.grad_stats(listed, histogram=True).data,
        "get_total_norm": lambda: gradstat.get_total_norm([p.grad for p in listed[:5]]),
        "clip_grad_norm_": lambda: gradstat.clip_grad_norm_(listed, 0.1),
        "clip_grad_value_": lambda: gradstat.clip_grad_value_(listed, 0.1),
    }


@pytest.mark.parametrize("name", calls([]))
def test_nothing_synchronises(name):
    call = calls(parameters())[name]
    with no_synchronisation():
        call()
        call()


def test_equal_input_gives_equal_bits():
    tensors = on_device(
        [sample(n, torch.bfloat16, seed=n) for n in (5_000_000, 70_000, *range(99))]
    )
    first = gradstat.tensor_stats(tensors, histogram=True)
    for _ in range(20):
        again = gradstat.tensor_stats(tensors, histogram=True)
        assert torch.equal(bits_of(again.data), bits_of(first.data))
        assert torch.equal(again.histogram_data, first.histogram_data)


def test_another_stream():
    tensors: list[Tensor | None] = [sample(n, torch.float32, seed=n) for n in (2_000_000, 9)]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)  # what is read is not there yet when the kernel is enqueued
        device_tensors = [tensor.pin_memory().to(CUDA, non_blocking=True) for tensor in tensors]
        table = gradstat.tensor_stats(device_tensors).data
    stream.synchronize()
    assert_table(table.cpu(), tensors, tolerance=TOLERANCE)


def test_several_streams_at_once():
    tensors: list[Tensor | None] = [sample(n, torch.float32, seed=n) for n in (3_000_000, 70_000)]
    device_tensors = on_device(tensors)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]
    tables = []
    for _ in range(10):
        for stream in streams:
            with torch.cuda.stream(stream):
                tables.append(gradstat.tensor_stats(device_tensors).data)
    torch.cuda.synchronize()
    assert_table(tables[0].cpu(), tensors, tolerance=TOLERANCE)
    assert all(torch.equal(bits_of(table), bits_of(tables[0])) for table in tables)


def test_graph_replays_read_what_is_there_then():
    listed = parameters()
    interleaved = torch.zeros(40, 30, device=CUDA).t()
    gradients: list[Tensor | None] = [*(p.grad for p in listed), interleaved]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        gradstat.tensor_stats(gradients, histogram=True)  # loads the kernels
        gradstat.clip_grad_norm_(listed, 0.5)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        table = gradstat.tensor_stats(gradients, histogram=True)
        data, bins = table.data, table.histogram_data
        norm = gradstat.clip_grad_norm_(listed, 0.5)
    for seed in range(3):
        fresh: list[Tensor | None] = []
        for gradient in gradients:
            if gradient is None:
                fresh.append(None)
                continue
            values = sample(gradient.numel(), gradient.dtype, seed=seed).view(gradient.shape)
            gradient.copy_(values)
            fresh.append(gradient.cpu())
        graph.replay()
        torch.cuda.synchronize()
        assert_table(data.cpu(), fresh, tolerance=TOLERANCE)
        assert (bins.cpu().numpy() == reference.histogram(fresh)).all()
        expected = reference.norm(fresh[:-1], 2)
        assert norm.item() == pytest.approx(expected, rel=2 * TOLERANCE)
        factor = reference.clip_coefficient(expected, 0.5)
        for p, before in zip(listed, fresh, strict=False):
            if before is not None:
                assert_near(p.grad, (before.double() * factor).to(before.dtype))


def test_the_runtime_of_its_own_works_beside_torch():
    # The module links the CUDA runtime statically; both must see the same context and device.
    device = torch.cuda.current_device()
    tensor = torch.ones(1000, device=CUDA)
    for _ in range(3):
        total = gradstat.tensor_stats([tensor.mul_(2)]).total_norm
        assert total == pytest.approx(tensor.norm().item(), rel=TOLERANCE)
    assert torch.cuda.current_device() == device
    assert _native.cuda_devices() == (torch.cuda.device_count(), "")


def test_every_device_keeps_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    last = torch.device("cuda", torch.cuda.device_count() - 1)
    torch.cuda.set_device(0)
    tensor = sample(100_000, torch.float32)
    table = gradstat.tensor_stats([tensor.to(last)])
    assert table.data.device == last
    assert torch.cuda.current_device() == 0
    assert_table(table.data.cpu(), [tensor], tolerance=TOLERANCE)


# ---- size ----------------------------------------------------------------------------------------

GIANT = 5_000_000_000


@pytest.mark.parametrize("shape", [(GIANT,), (5, GIANT // 5), (50_000, 100_000)], ids=str)
def test_five_billion_elements(shape):
    if torch.cuda.mem_get_info()[0] < 2 * GIANT + 2**30:
        pytest.skip("needs 11 GB of free device memory")
    tensor = torch.zeros(GIANT, dtype=torch.bfloat16, device=CUDA)
    places = [0, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, GIANT - 1]
    tensor[torch.tensor(places, device=CUDA)] = 2.0
    living = {place // (GIANT // shape[0]) for place in places}
    table = gradstat.tensor_stats([tensor.view(shape)], histogram=True)
    row = dict(zip(reference.COLUMNS, table.data[0].tolist(), strict=True))
    n = len(places)
    assert row == {
        "numel": GIANT, "zeros": GIANT - n, "nans": 0, "infs": 0, "sum": 2 * n, "abs_sum": 2 * n,
        "sq_sum": 4 * n, "abs_max": 2, "abs_min": 2, "rows": shape[0],
        "dead_rows": shape[0] - len(living), "l2": math.sqrt(4 * n),
    }  # fmt: skip
    assert table.histogram_data[0].count_nonzero() == 1
    assert table.histogram_data[0, 128] == n
    factor = torch.full((1,), 0.5, dtype=torch.float64, device=CUDA)
    _native.scale(_native.TensorList([tensor], False), factor, False)
    assert tensor[places].tolist() == [1.0] * n
    tensor.fill_(1.0)
    assert gradstat.tensor_stats([tensor]).data[0, reference.COLUMNS.index("sum")].item() == GIANT
