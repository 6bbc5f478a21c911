"""Which layer an activation's units and weight are found to be of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from watched_models import replicate

import gradstat


class Model(nn.Module):
    """A forward pass in a function of the model and its inputs."""

    def __init__(self, forward: Callable[..., Any], **parts: nn.Module) -> None:
        super().__init__()
        self.function = forward
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


def found(model: nn.Module, *inputs: Tensor) -> list[tuple[str, int, str | None]]:
    with gradstat.ActivationMonitor(model, every=1) as monitor:
        model(*inputs)
    return [(row.kind, row.units, row.weight) for row in monitor.table()]


def squeeze_excite(m: Any, x: Tensor) -> Tensor:
    out = m.conv(x)
    gate = torch.sigmoid(m.fc(out.mean((2, 3))))[:, :, None, None]
    return torch.relu(gate * out + x)


def film(m: Any, x: Tensor) -> Tensor:
    out = m.conv(x)
    return functional.silu(m.norm(out + m.fc(x.mean((2, 3)))[:, :, None, None]))


def residual(m: Any, x: Tensor) -> Tensor:
    out = m.norm(m.conv(x))
    out += m.skip(x)
    return functional.relu_(out)


def side_by_side(m: Any, x: Tensor) -> Tensor:
    a, b = m.a(x), m.b(x)
    return functional.relu(a) + torch.tanh(b)


IMAGE, SIGNAL, ROWS = (2, 3, 5, 6), (5, 3, 6), (5, 3)
WAYS: dict[str, tuple[nn.Module, tuple[int, ...], list[tuple[str, int, str | None]]]] = {
    "squeeze_excite": (
        Model(squeeze_excite, conv=nn.Conv2d(3, 3, 1), fc=nn.Linear(3, 3)), IMAGE,
        [("sigmoid", 3, "fc.weight"), ("relu", 3, "conv.weight")]),
    "film": (
        Model(film, conv=nn.Conv2d(3, 4, 1), fc=nn.Linear(3, 4), norm=nn.GroupNorm(2, 4)), IMAGE,
        [("silu", 4, "conv.weight")]),
    "residual": (
        Model(residual, conv=nn.Conv2d(3, 4, 1), norm=nn.BatchNorm2d(4), skip=nn.Conv2d(3, 4, 1)),
        IMAGE, [("relu", 4, "conv.weight")]),
    "side_by_side": (
        Model(side_by_side, a=nn.Linear(3, 4), b=nn.Linear(3, 4)), ROWS,
        [("relu", 4, "a.weight"), ("tanh", 4, "b.weight")]),
    "concatenated": (
        Model(lambda m, x: torch.cat([m.a(x), m.b(x)], 1).relu(),
              a=nn.Conv1d(3, 4, 1), b=nn.Conv1d(3, 4, 1)), SIGNAL,
        [("relu", 8, None)]),
    "concatenated_by_channels": (
        Model(lambda m, x: torch.cat([m.conv(x), m.fc(x)], 1).relu(),
              conv=nn.Conv1d(3, 4, 1), fc=nn.Linear(6, 6)), SIGNAL,
        [("relu", 7, None)]),
    "gated_halves": (
        Model(lambda m, x: functional.silu(m.a(x).chunk(2, -1)[1]), a=nn.Linear(3, 8)), ROWS,
        [("silu", 4, None)]),
    "pooled_signal": (
        nn.Sequential(nn.Conv1d(3, 4, 1), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.ReLU()), SIGNAL,
        [("relu", 4, "0.weight")]),
    "flattened_signal": (
        nn.Sequential(nn.Conv1d(3, 4, 1), nn.Flatten(), nn.ReLU()), SIGNAL,
        [("relu", 24, None)]),
    "image_of_features": (
        nn.Sequential(nn.Linear(3, 16), nn.Unflatten(1, (4, 2, 2)), nn.BatchNorm2d(4), nn.ReLU()),
        ROWS, [("relu", 4, None)]),
    "norm_first": (nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), IMAGE, [("relu", 3, None)]),
    "recurrent_cell": (
        Model(lambda m, x: m.cell(m.conv(x).mean(-1))[0].relu(),
              conv=nn.Conv1d(3, 4, 1), cell=nn.LSTMCell(4, 7)), SIGNAL,
        [("relu", 7, None)]),
    "recurrent": (
        Model(lambda m, x: m.lstm(m.conv(x))[0].relu(),
              conv=nn.Conv1d(3, 4, 1), lstm=nn.LSTM(6, 7)), SIGNAL,
        [("relu", 7, None)]),
    "out_of_sight": (
        Model(lambda m, x: torch.from_numpy(m.conv(x).detach().numpy()).relu(),
              conv=nn.Conv1d(3, 4, 1)), SIGNAL,
        [("relu", 4, None)]),
    "one_number": (
        Model(lambda m, x: m.fc(x).squeeze().relu(), fc=nn.Linear(3, 1)), (3,),
        [("relu", 1, "fc.weight")]),
    "parameter_of_a_product": (
        Model(lambda m, x: torch.einsum("bi,oi->bo", x, m.fc.weight).softmax(-1),
              fc=nn.Linear(3, 4)), ROWS,
        [("softmax", 4, None)]),
    "tied_weight": (
        Model(lambda m, x: (x @ m.fc.weight.t()).softmax(-1), fc=nn.Linear(3, 4)), ROWS,
        [("softmax", 4, None)]),
}  # fmt: skip


@pytest.mark.parametrize(("model", "shape", "right"), WAYS.values(), ids=WAYS)
def test_units_and_weight_follow_the_data(model, shape, right):
    assert found(model, torch.randn(shape)) == right


def attend(m: Any, x: Tensor) -> Tensor:
    scores = m.q(x) @ m.k(x).transpose(-2, -1)
    return (m.bias(torch.zeros(3, 3, dtype=torch.long))[..., 0] + scores).softmax(-1)


def test_a_bias_of_its_own_layer_makes_no_gate_of_attention():
    model = Model(attend, q=nn.Linear(4, 4), k=nn.Linear(4, 4), bias=nn.Embedding(2, 1))
    assert found(model, torch.randn(2, 3, 4)) == []


def test_weights_of_a_replica_have_the_names_of_the_model():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), WAYS["tied_weight"][0])
    model[2].fc = nn.Linear(4, 5)
    monitor = gradstat.ActivationMonitor(model, every=1)
    replicate(model)(torch.randn(2, 3))
    assert [(row.kind, row.weight) for row in monitor.table()] == [
        ("relu", "0.weight"),
        ("softmax", None),
    ]


UNITS = {
    "linear_2d": (nn.Sequential(nn.Linear(4, 7), nn.ReLU()), (5, 4), 7),
    "linear_3d": (nn.Sequential(nn.Linear(4, 7), nn.ReLU()), (5, 6, 4), 7),
    "linear_4d": (nn.Sequential(nn.Linear(4, 7), nn.ReLU()), (5, 6, 3, 4), 7),
    "linear_1d": (nn.Sequential(nn.Linear(4, 7), nn.ReLU()), (4,), 7),
    "conv1d": (nn.Sequential(nn.Conv1d(4, 7, 1), nn.ReLU()), (5, 4, 6), 7),
    "conv2d": (nn.Sequential(nn.Conv2d(4, 7, 1), nn.ReLU()), (5, 4, 6, 6), 7),
    "conv2d_unbatched": (nn.Sequential(nn.Conv2d(4, 7, 1), nn.ReLU()), (4, 6, 6), 7),
    "conv3d": (nn.Sequential(nn.Conv3d(4, 7, 1), nn.ReLU()), (5, 4, 2, 2, 2), 7),
    "conv_transpose2d": (nn.Sequential(nn.ConvTranspose2d(4, 7, 1), nn.ReLU()), (5, 4, 6, 6), 7),
    "conv_pooled": (
        nn.Sequential(nn.Conv2d(4, 7, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.ReLU()),
        (5, 4, 6, 6), 7),
    "nothing_before": (nn.Sequential(nn.ReLU()), (5, 4, 6), 4),
    "scalar": (nn.Sequential(nn.ReLU()), (), 1),
}  # fmt: skip


@pytest.mark.parametrize(("model", "shape", "units"), UNITS.values(), ids=UNITS)
def test_units_are_those_of_the_layer_before(model, shape, units):
    with gradstat.ActivationMonitor(model, every=1) as monitor:
        model(torch.randn(shape))
    row = monitor.table()[0]
    assert row.units == units
    assert row.samples * units == row.moments.numel
    if "Conv2d" in str(model[0]):
        assert row.weight == "0.weight"
    if isinstance(model[0], nn.ConvTranspose2d):
        assert row.weight is None


def test_unit_dim_can_be_said():
    model = nn.Sequential(nn.Linear(4, 7), nn.ReLU())
    with gradstat.ActivationMonitor(model, every=1, unit_dim=1) as monitor:
        model(torch.randn(5, 7, 4))
    row = monitor.table()[0]
    assert (row.units, row.samples, row.weight) == (7, 35, None)  # not the 7 of the last dimension
