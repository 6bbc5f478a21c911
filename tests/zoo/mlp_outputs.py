"""Healthy MLPs whose output layers fit their losses, though others of their kind do not."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy, mse_loss, one_hot, smooth_l1_loss
from torch.optim import SGD, Adam, AdamW, RMSprop

from zoo.data import cancer, diabetes, diabetes_raw, iris, waves
from zoo.models import mlp
from zoo.program import Watch, fit, program


@program("mlp/diabetes/healthy-softplus", operator="positive output and targets", half="tuning")
def _(watch: Watch) -> nn.Module:
    """Targets from 0.25 to 3.5, outputs above 0."""
    model = nn.Sequential(mlp((10, 32, 1)), nn.Softplus())
    optimizer = Adam(model.parameters(), lr=2e-3)
    data = diabetes_raw().map(targets=lambda y: y / 100)
    return fit(watch, model, optimizer, mse_loss, data, epochs=15)


@program("mlp/cancer/healthy-sigmoid", operator="probabilities in their own loss", half="tuning")
def _(watch: Watch) -> nn.Module:
    """Sigmoid output and the cross entropy of probabilities."""
    model = nn.Sequential(mlp((30, 32, 1)), nn.Sigmoid())
    optimizer = RMSprop(model.parameters(), lr=1e-3)
    data = cancer().map(targets=lambda y: y[:, None].float())
    return fit(watch, model, optimizer, binary_cross_entropy, data, epochs=10)


@program("mlp/iris/healthy-brier", operator="probabilities in their own loss", half="tuning")
def _(watch: Watch) -> nn.Module:
    """Softmax output and squared error to one-hot targets: the Brier score."""
    model = nn.Sequential(mlp((4, 16, 3), nn.Tanh), nn.Softmax(dim=1))
    optimizer = Adam(model.parameters(), lr=0.01)
    data = iris().map(targets=lambda y: one_hot(y, 3).float())
    return fit(watch, model, optimizer, mse_loss, data, epochs=25, batch_size=16)


@program("mlp/waves/healthy-tanh-output", operator="bounded output and targets", half="tuning")
def _(watch: Watch) -> nn.Module:
    """Targets scaled to -0.9 to 0.9, outputs from -1 to 1."""
    model = nn.Sequential(mlp((2, 32, 32, 1)), nn.Tanh())
    optimizer = AdamW(model.parameters(), lr=5e-3)
    largest = waves().y.abs().max()
    data = waves().map(targets=lambda y: 0.9 * y / largest)
    return fit(watch, model, optimizer, mse_loss, data, epochs=15)


class Squeezed(nn.Module):
    """A value for each row, ``[n]``."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp((10, 16, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).squeeze(1)


@program(
    "mlp/diabetes/healthy-squeezed", operator="outputs and targets of one shape", half="tuning"
)
def _(watch: Watch) -> nn.Module:
    """Outputs ``[n]`` against targets ``[n]``."""
    model = Squeezed()
    optimizer = SGD(model.parameters(), lr=0.05)
    data = diabetes().map(targets=lambda y: y[:, 0])
    return fit(watch, model, optimizer, smooth_l1_loss, data, epochs=20)
