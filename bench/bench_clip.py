"""The clipping functions on the CPU, against torch's of the same names."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import shapes
import torch
from float64_checks import check_clipping, check_norm, check_not_clipping, expected_norm
from pairing import Pair, Side
from workload import FallingLimit, count_bytes, gradients, parameters

import gradstat

Compare = Callable[[Pair], None]
Read = Callable[[int], Side]

# Targets are for calls that do not clip and for calls that clip.
WORKS = {
    "64 x 1M": (lambda: shapes.LARGE, 0.40, 0.85),
    "ResNet-50": (shapes.resnet50, 0.40, None),
    "GPT-2 124M": (shapes.gpt2_124m, 0.40, None),
}


@pytest.mark.parametrize("work", WORKS)
def bench_clip_grad_norm_that_does_not_clip(work: str, compare: Compare, read: Read) -> None:
    make_shapes, target, _ = WORKS[work]
    params = parameters(make_shapes())
    max_norm = 2 * check_not_clipping(params)
    n_bytes = count_bytes(params)
    compare(
        Pair(
            f"clip_grad_norm_ that does not clip, {work} fp32",
            ours=Side(
                "clip_grad_norm_", lambda: gradstat.clip_grad_norm_(params, max_norm), n_bytes
            ),
            against=Side(
                "torch clip_grad_norm_",
                lambda: torch.nn.utils.clip_grad_norm_(params, max_norm),
                3 * n_bytes,
            ),
            read=read(n_bytes),
            target=target,
            headline=work != "64 x 1M",
        )
    )


@pytest.mark.parametrize("work", WORKS)
def bench_clip_grad_norm_that_clips(work: str, compare: Compare, read: Read) -> None:
    make_shapes, _, target = WORKS[work]
    params = parameters(make_shapes())
    limit = FallingLimit(check_clipping(params), factor=0.999)
    n_bytes = 3 * count_bytes(params)  # read to measure; read and written to scale
    compare(
        Pair(
            f"clip_grad_norm_ that clips, {work} fp32",
            ours=Side(
                "clip_grad_norm_", lambda: limit.clip(gradstat.clip_grad_norm_, params), n_bytes
            ),
            against=Side(
                "torch clip_grad_norm_",
                lambda: limit.clip(torch.nn.utils.clip_grad_norm_, params),
                n_bytes,
            ),
            read=read(n_bytes),
            target=target,
        )
    )
    limit.check()


def bench_get_total_norm(compare: Compare, read: Read) -> None:
    params = parameters(shapes.LARGE)
    grads = gradients(params)
    check_norm(gradstat.get_total_norm(grads), expected_norm(grads))
    n_bytes = count_bytes(params)
    compare(
        Pair(
            "get_total_norm, 64 x 1M fp32",
            ours=Side("get_total_norm", lambda: gradstat.get_total_norm(grads), n_bytes),
            against=Side(
                "torch get_total_norm", lambda: torch.nn.utils.get_total_norm(grads), n_bytes
            ),
            read=read(n_bytes),
        )
    )


def bench_clip_grad_value(compare: Compare, read: Read) -> None:
    params = parameters(shapes.LARGE)
    grads = gradients(params)
    limit = 0.01
    before = [grad.clone() for grad in grads[::9]]
    gradstat.clip_grad_value_(params, limit)
    for after, old in zip(grads[::9], before, strict=True):
        assert torch.equal(after, old.clamp(-limit, limit))
    n_bytes = 2 * count_bytes(params)  # read and written
    compare(
        Pair(
            "clip_grad_value_, 64 x 1M fp32",
            ours=Side(
                "clip_grad_value_", lambda: gradstat.clip_grad_value_(params, limit), n_bytes
            ),
            against=Side(
                "torch clip_grad_value_",
                lambda: torch.nn.utils.clip_grad_value_(params, limit),
                n_bytes,
            ),
            read=read(n_bytes),
        )
    )
