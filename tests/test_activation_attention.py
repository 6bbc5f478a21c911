"""Softmax: gates and classifiers always, the probabilities of attention where asked for."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from watched_models import Calls, seen

import gradstat
from gradstat.activations.calls import attention_probabilities


@pytest.mark.parametrize(
    ("shape", "dim"), [((3,), 0), ((3, 4), 1), ((3, 4, 5), 0), ((3, 4, 5, 6), 1)]
)
@pytest.mark.filterwarnings("ignore:Implicit dimension choice:UserWarning")
def test_softmax_without_a_dimension(shape, dim):
    x = torch.zeros(shape)
    x.select(dim, 1).fill_(100.0)
    row = seen(Calls(functional.softmax), x)[0]
    assert (row.units, row.stuck_units, row.saturated_fraction) == (shape[dim], 1, 1.0)


def test_softmin_is_the_softmax_of_the_negative():
    x = torch.tensor([[100.0, 0.0, 100.0], [0.0, 100.0, 0.0]])
    row = seen(Calls(lambda y: functional.softmin(y, dim=-1)), x)[0]
    assert (row.units, row.saturated_fraction) == (3, 0.5)


def test_gumbel_softmax_is_over_its_own_dimension_and_never_one_hot():
    x = torch.tensor([[1000.0, 0.0, 0.0], [1000.0, 0.0, 0.0]])
    row = seen(Calls(lambda y: functional.gumbel_softmax(y, 0.5)), x)[0]
    assert (row.units, row.saturated_fraction) == (3, 1.0)
    assert len(seen(Calls(lambda y: functional.gumbel_softmax(y, 0.5, True)), x)) == 0


class Attention(nn.Module):
    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).movedim(-2, 1).unbind(-2)
        if self.fused:
            return functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        scores = q @ k.transpose(-2, -1) / 2.0
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        return scores.masked_fill(~mask, -math.inf).softmax(-1) @ v


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "written_out"])
def test_attention_is_counted_by_heads_where_asked_for(fused):
    torch.manual_seed(0)
    model = Attention(fused)
    x = torch.randn(3, 5, 8) * 3
    assert seen(model, x).names == ()
    table = seen(model, x, attention=True)
    assert table.names == ("softmax#0",)
    row = table[0]
    q, k, _ = model.qkv(x).unflatten(-1, (3, 2, 4)).movedim(-2, 1).unbind(-2)
    scores = (q @ k.transpose(-2, -1) / 2.0).double()
    scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -math.inf)
    largest = scores.softmax(-1).amax(-1)
    assert row.units == 2
    assert row.high_counts.tolist() == (largest > 0.999).sum((0, 2)).tolist()
    assert 6 <= row.saturated_high < 30  # the first position sees itself alone
    assert row.saturated_fraction == row.saturated_high / 30


MASKS = {
    "none": {},
    "bool": {"attn_mask": torch.ones(5, 5).tril().bool()},
    "float": {"attn_mask": torch.zeros(5, 5).masked_fill(torch.ones(5, 5).triu(1).bool(), -9.0)},
    "scale": {"scale": 3.0},
    "grouped": {"enable_gqa": True},
    "dropout": {"dropout_p": 0.5},
}


@pytest.mark.parametrize("options", MASKS.values(), ids=MASKS)
def test_attention_probabilities_are_those_that_torch_uses(options):
    generator = torch.Generator().manual_seed(0)
    heads = 1 if "enable_gqa" in options else 2
    q = torch.randn(3, 2, 5, 4, generator=generator)
    k, v = (torch.randn(3, heads, 5, 4, generator=generator) for _ in range(2))
    state = torch.get_rng_state()
    function = functional.scaled_dot_product_attention
    found = attention_probabilities(function, (q, k, v), options, v)
    assert torch.equal(state, torch.get_rng_state())
    assert found is not None
    without_dropout = {key: value for key, value in options.items() if key != "dropout_p"}
    right = functional.scaled_dot_product_attention(q, k, v, **without_dropout)
    torch.testing.assert_close(found @ v, right)


def masked_attention(x: Tensor) -> Tensor:
    sees = torch.ones(5, 5, dtype=torch.bool)
    sees[3] = False
    return functional.scaled_dot_product_attention(x, x, x, sees)


def masked_heads(attention: nn.MultiheadAttention) -> Callable[[Tensor], Tensor]:
    hidden = torch.zeros(5, 5, dtype=torch.bool)
    hidden[3] = True
    return lambda x: attention(x, x, x, attn_mask=hidden, need_weights=False)[0]


@pytest.mark.parametrize("shape", [(3, 5, 8), (5, 8)], ids=["batched", "unbatched"])
@pytest.mark.parametrize("multi_head", [True, False])
def test_a_query_that_sees_no_key_makes_no_nan(multi_head, shape):
    heads = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    model = Calls(masked_heads(heads) if multi_head else masked_attention)
    model.heads = heads
    row = seen(model, x, attention=True)[0]
    assert model(x).isfinite().all()
    assert row.moments.nans == 0
    assert row.zero_fraction == 0.2
    x = x.clone()
    x[..., 0, 0] = math.nan
    assert seen(model, x, attention=True)[0].moments.nans > 0


def test_scores_beyond_the_range_of_fp16_are_scaled_first():
    x = torch.full((1, 2, 5, 64), 40.0, dtype=torch.float16)
    row = seen(Calls(lambda y: functional.scaled_dot_product_attention(y, y, y)), x, attention=True)
    assert row[0].moments.mean == pytest.approx(0.2, rel=1e-3)


def test_a_mask_that_computes_itself_is_passed_over():
    mask = causal_lower_right(3, 5)
    model = Calls(lambda x: functional.scaled_dot_product_attention(x[:, :3], x, x, mask).relu())
    x = torch.randn(2, 5, 4)
    right = model(x)
    with gradstat.ActivationMonitor(model, every=1, attention=True) as monitor:
        assert torch.equal(model(x), right)
    assert monitor.table().names == ("relu#0",)


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=str)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_attention_over_nested_tensors_is_passed_over(layout):
    if layout is torch.jagged:
        parts = [torch.ones(2, 2, 4), torch.ones(3, 2, 4)]
        x = torch.nested.nested_tensor(parts, layout=layout).transpose(1, 2)
    else:
        x = torch.nested.nested_tensor([torch.ones(2, 2, 4), torch.ones(2, 3, 4)], layout=layout)
    model = Calls(lambda y: functional.scaled_dot_product_attention(y, y, y))
    with gradstat.ActivationMonitor(model, every=1, attention=True) as monitor:
        model(x)
    assert len(monitor.table()) == 0


@pytest.mark.parametrize("batched", [True, False])
def test_multi_head_attention(batched):
    torch.manual_seed(0)
    model = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)
    x = torch.randn(3, 5, 8) if batched else torch.randn(5, 8)
    assert seen(model, x, x, x).names == ()
    row = seen(model, x, x, x, attention=True)[0]
    assert row.units == (2 if batched else 1)
    assert row.moments.sum == pytest.approx(2 * 5 * (3 if batched else 1), rel=1e-6)


class ByItself(nn.Module):
    """Attention, then a product that selective checkpointing gives back in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        attended = functional.scaled_dot_product_attention(self.query(x), x, x)
        return (attended @ x.mT).tanh()


def test_selective_checkpointing_sees_nothing_of_the_probabilities():
    def policy(_context, op, *_args, **_kwargs):
        is_product = op is torch.ops.aten.bmm.default
        return CheckpointPolicy.MUST_SAVE if is_product else CheckpointPolicy.PREFER_RECOMPUTE

    def gradients(watches: bool) -> list[Tensor]:
        torch.manual_seed(0)
        body = ByItself()
        contexts = partial(create_selective_checkpoint_contexts, policy)
        model = Calls(lambda x: checkpoint(body, x, use_reentrant=False, context_fn=contexts))
        inputs = torch.randn(2, 5, 8)
        with gradstat.ActivationMonitor(model, every=1, attention=True) as monitor:
            if not watches:
                monitor.remove()
            model(inputs).square().sum().backward()
        assert len(monitor.table()) == 2 * watches
        return [p.grad for p in body.parameters() if p.grad is not None]

    for plain, watched in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(plain, watched)


def test_a_gate_is_no_attention():
    model = nn.Sequential(nn.Linear(4, 3), nn.Softmax(-1))
    x = torch.tensor([[100.0, 0, 0, 0], [0.0, 0, 0, 0]])
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(3, 4))
        model[0].bias.zero_()
    row = seen(model, x)[0]
    assert row.units == 3
    assert row.high_counts.tolist() == [1, 0, 0]
    assert row.saturated_fraction == 0.5
