"""The table of statistics on the CPU: against a clipping call, and against reading the bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import shapes
import torch
from float64_checks import check_histogram, check_table
from pairing import Pair, Side
from workload import count_bytes, gradients, parameters

import gradstat
from gradstat import _kernels

Compare = Callable[[Pair], None]
Read = Callable[[int], Side]


def torch_clip(params: list[torch.nn.Parameter], n_bytes: int) -> Side:
    """Torch's call on gradients that it need not clip; it reads them, reads and writes them."""
    return Side(
        "torch clip_grad_norm_",
        lambda: torch.nn.utils.clip_grad_norm_(params, 1e6),
        3 * n_bytes,
    )


@pytest.mark.parametrize("function", ["grad_stats", "tensor_stats"])
def bench_small_tensors(function: str, compare: Compare, read: Read) -> None:
    params = parameters(shapes.SMALL)
    grads = gradients(params)
    n_bytes = count_bytes(params)
    runs = {
        "grad_stats": lambda: gradstat.grad_stats(params),
        "tensor_stats": lambda: gradstat.tensor_stats(grads),
    }
    run = runs[function]
    check_table(run(), grads)
    compare(
        Pair(
            f"{function}, 1000 x 64 fp32",
            ours=Side(function, run, n_bytes),
            against=torch_clip(params, n_bytes),
            read=read(n_bytes),
            target=0.06,
            headline=function == "grad_stats",
        )
    )


# fp64 has half as many tensors, for the same bytes as fp32.
@pytest.mark.parametrize(
    ("dtype", "count", "target"),
    [
        (torch.float32, 64, 1.10),
        (torch.bfloat16, 64, 1.35),
        (torch.float16, 64, None),
        (torch.float64, 32, None),
    ],
    ids=["fp32", "bf16", "fp16", "fp64"],
)
def bench_large_tensors(
    request: pytest.FixtureRequest,
    dtype: torch.dtype,
    count: int,
    target: float | None,
    compare: Compare,
    read: Read,
) -> None:
    params = parameters(shapes.LARGE[:count], dtype)
    check_table(gradstat.grad_stats(params), gradients(params))
    name = request.node.callspec.id
    compare(against_reading(f"grad_stats, {count} x 1M {name}", params, read, target))


def against_reading(
    work: str, params: list[torch.nn.Parameter], read: Read, target: float | None
) -> Pair:
    """Pair the table of these gradients with reading as many bytes as one flat fp32 tensor."""
    n_bytes = count_bytes(params)
    same_bytes = read(n_bytes)
    assert same_bytes.n_bytes == n_bytes
    ours = Side("grad_stats", lambda: gradstat.grad_stats(params), n_bytes)
    return Pair(work, ours, same_bytes, same_bytes, target)


def bench_histogram(compare: Compare, read: Read) -> None:
    params = parameters(shapes.LARGE)
    table = gradstat.grad_stats(params, histogram=True)
    check_table(table, gradients(params))
    check_histogram(table)
    n_bytes = count_bytes(params)
    compare(
        Pair(
            "grad_stats with histogram, 64 x 1M fp32",
            ours=Side("grad_stats", lambda: gradstat.grad_stats(params, histogram=True), n_bytes),
            against=Side("grad_stats without", lambda: gradstat.grad_stats(params), n_bytes),
            read=read(n_bytes),
            target=2.0,
            headline=False,
        )
    )


@pytest.mark.parametrize("network", ["ResNet-50", "GPT-2 124M"])
def bench_network(network: str, compare: Compare, read: Read) -> None:
    params = parameters({"ResNet-50": shapes.resnet50, "GPT-2 124M": shapes.gpt2_124m}[network]())
    check_table(gradstat.grad_stats(params), gradients(params))
    n_bytes = count_bytes(params)
    compare(
        Pair(
            f"grad_stats, {network} fp32",
            ours=Side("grad_stats", lambda: gradstat.grad_stats(params), n_bytes),
            against=torch_clip(params, n_bytes),
            read=read(n_bytes),
        )
    )


def other_variants() -> list[str]:
    """Return the CPU variants that run here, without the one in use."""
    config = gradstat.get_config()
    return [
        name for name, runs in config.cpu_variants.items() if runs and name != config.cpu_variant
    ]


@pytest.fixture(params=other_variants())
def variant(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the kernels of another instruction set."""
    _kernels.use_cpu_variant(request.param)
    yield request.param
    _kernels.use_cpu_variant("")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def bench_variant(variant: str, dtype: torch.dtype, compare: Compare, read: Read) -> None:
    params = parameters(shapes.LARGE, dtype)
    check_table(gradstat.grad_stats(params), gradients(params))
    name = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    compare(against_reading(f"grad_stats, 64 x 1M {name}, {variant}", params, read, None))
