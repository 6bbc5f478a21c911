"""Runs every CUDA kernel once on little memory, for `compute-sanitizer` (see `make gpu-sanitize`).

Kept small: the sanitizer slows kernels down a hundredfold.
"""

from __future__ import annotations

import torch

import gradstat
from gradstat._kernels import units
from gradstat._units import ActiveRule, UnitRule


def main() -> None:
    """Run the kernels over every dtype, alignment, kind of row and way of clipping."""
    torch.manual_seed(0)
    tensors: list[torch.Tensor | None] = [None, torch.empty(0, 3, device="cuda")]
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        for n in (1, 9, 2051, 70_001):
            # Allocated to measure: an access beyond either end is out of bounds.
            tensors.append(torch.randn(n, device="cuda").to(dtype))
            tensors.append(torch.randn(n + 1, device="cuda").to(dtype)[1:])
        rows = torch.randn(300, 100, device="cuda").to(dtype)
        rows[::3] = 0
        tensors += [rows, rows.t(), torch.zeros(2, 70_000, device="cuda", dtype=dtype)]
    special = torch.randn(5000, device="cuda")
    special[::7] = torch.nan
    special[3::7] = torch.inf
    tensors.append(special)
    tensors += [torch.ones(3, device="cuda")] * 1700  # a second launch

    table = gradstat.tensor_stats(tensors, histogram=True)
    print(table.total)
    finite = [t.clone().requires_grad_() for t in tensors[:60] if t is not None]
    for tensor in finite:
        tensor.grad = tensor.detach().clone().nan_to_num(0.0, 0.0, 0.0)
    for norm_type in (1.0, 2.0, float("inf")):
        print(gradstat.clip_grad_norm_(finite, 1.0, norm_type).item())
    gradstat.clip_grad_value_(finite, 1e-3)
    print(gradstat.get_total_norm([tensor.grad for tensor in finite]).item())
    rule = UnitRule(ActiveRule.NOT_LOW, -0.5, 0.5, 1.0)
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        for shape in ((300, 7), (33, 70, 49), (5, 3, 3137), (9, 4099)):
            print(units(torch.randn(shape, device="cuda").to(dtype), rule, 1).counts.sum().item())
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
