"""Closures: the gradients are read after them, once for each call, and a step counts once."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_training import (
    backward,
    grad_norm,
    grads,
    loss_of,
    make_model,
    monitor_of,
    norm_of,
    optimizer_tensors,
    poison,
    same_bits,
    weights,
)
from torch import Tensor, nn

import gradstat


def closure_for(
    model: nn.Module, optimizer: torch.optim.Optimizer, seed: int, bad: bool = False
) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, seed)
        loss.backward()
        if bad:
            poison(model)
        return loss

    return closure


FORMS: dict[str, Callable[[torch.optim.Optimizer, Any], Any]] = {
    "positional": lambda optimizer, closure: optimizer.step(closure),
    "keyword": lambda optimizer, closure: optimizer.step(closure=closure),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_closure_is_measured_after_it_ran(form: Any) -> None:
    model, plain_model = make_model(), make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    plain = torch.optim.SGD(plain_model.parameters(), lr=0.1, momentum=0.9)
    gradstat.attach(optimizer, model, clip=gradstat.GlobalNorm(0.3))
    for step in range(5):
        backward(plain_model, step)
        norm = grad_norm(plain_model)
        expected = loss_of(plain_model, step).item()
        torch.nn.utils.clip_grad_norm_(plain_model.parameters(), 0.3)
        plain.step()
        loss = form(optimizer, closure_for(model, optimizer, step))
        assert loss.item() == pytest.approx(expected, rel=1e-5)
        assert monitor_of(optimizer).total_norm == pytest.approx(norm, rel=1e-5)
    for a, b in zip(weights(model), weights(plain_model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert monitor_of(optimizer).step == 5


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_closure_with_bad_gradients_is_skipped(form: Any) -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    gradstat.attach(optimizer, model, clip="auto")
    form(optimizer, closure_for(model, optimizer, 0))
    expected = weights(model), optimizer_tensors(optimizer)
    form(optimizer, closure_for(model, optimizer, 1, bad=True))
    assert same_bits(weights(model), expected[0])
    assert same_bits(optimizer_tensors(optimizer), expected[1])
    assert None not in grads(model)
    assert monitor_of(optimizer).skipped_steps == 1


def test_the_grad_mode_of_a_closure_is_the_optimizers_affair() -> None:
    class NoGrad(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            modes.append(closure())

    modes: list[bool] = []
    optimizer = gradstat.attach(NoGrad([nn.Parameter(torch.zeros(1))], lr=0.1))
    optimizer.param_groups[0]["params"][0].grad = torch.ones(1)
    optimizer.step(torch.is_grad_enabled)
    assert modes == [False]


def lbfgs(model: nn.Module, **options: Any) -> torch.optim.LBFGS:
    return torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=5, **options)


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_lbfgs_watched_is_lbfgs(line_search: str | None) -> None:
    model, plain_model = make_model(), make_model()
    optimizer = lbfgs(model, line_search_fn=line_search)
    plain = lbfgs(plain_model, line_search_fn=line_search)
    gradstat.attach(optimizer, model, updates=True)
    for _ in range(4):
        before = weights(model)
        loss = optimizer.step(closure_for(model, optimizer, 0))
        assert torch.equal(loss, plain.step(closure_for(plain_model, plain, 0)))
        changes = [a - b for a, b in zip(weights(model), before, strict=True)]
        ratio = norm_of(changes[:1]) / norm_of(before[:1])
        assert monitor_of(optimizer).update_ratio[-1, 0] == pytest.approx(ratio, rel=1e-6)
    assert same_bits(weights(model), weights(plain_model))
    monitor = monitor_of(optimizer)
    assert monitor.step == 4
    assert list(monitor.recorded_steps) == [1, 2, 3, 4]


def test_lbfgs_clips_every_evaluation() -> None:
    model = make_model()
    optimizer = lbfgs(model)
    gradstat.attach(optimizer, model, clip=gradstat.GlobalNorm(1e-3))
    seen: list[float] = []
    closure = closure_for(model, optimizer, 0)

    def recording() -> Tensor:
        loss = closure()
        seen.append(grad_norm(model))
        return loss

    optimizer.step(recording)
    assert len(seen) > 1
    assert grad_norm(model) <= 1.001e-3
    assert monitor_of(optimizer).total_norm == pytest.approx(seen[-1])
    assert monitor_of(optimizer).step == 1


def test_lbfgs_with_a_bad_first_evaluation_stays_where_it_is() -> None:
    model = make_model()
    optimizer = lbfgs(model)
    gradstat.attach(optimizer, model, clip="auto")
    before = weights(model)
    optimizer.step(closure_for(model, optimizer, 0, bad=True))
    assert same_bits(weights(model), before)
    assert None not in grads(model)
    optimizer.step(closure_for(model, optimizer, 0))
    assert not same_bits(weights(model), before)
    assert all(bool(w.isfinite().all()) for w in weights(model))


class Sam(torch.optim.Optimizer):
    """Sharpness-aware minimisation as it is commonly written: two gradients, an inner optimizer."""

    def __init__(self, parameters: Any, inner: type[torch.optim.Optimizer], **options: Any) -> None:
        super().__init__(parameters, {"rho": 0.05, **options})
        self.inner = inner(self.param_groups, **options)
        self.param_groups = self.inner.param_groups

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        climbed = []
        parameters = [p for group in self.param_groups for p in group["params"]]
        norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in parameters]))
        for parameter in parameters:
            climb = parameter.grad * (0.05 / (norm + 1e-12))
            parameter.add_(climb)
            climbed.append(climb)
        self.zero_grad()
        with torch.enable_grad():
            loss = closure()
        for parameter, climb in zip(parameters, climbed, strict=True):
            parameter.sub_(climb)
        self.inner.step()
        return loss


@pytest.mark.parametrize("at", ["outer", "inner"])
def test_sam_is_measured_at_the_gradients_that_it_uses(at: str) -> None:
    model, plain_model = make_model(), make_model()
    optimizer = Sam(model.parameters(), torch.optim.SGD, lr=0.1)
    plain = Sam(plain_model.parameters(), torch.optim.SGD, lr=0.1)
    target = gradstat.attach(optimizer if at == "outer" else optimizer.inner, model)
    for step in range(4):
        for this, sam in ((model, optimizer), (plain_model, plain)):
            backward(this, step)
            before = weights(this)
            sam.step(closure_for(this, sam, step))
        assert same_bits(weights(model), weights(plain_model))
        moved = norm_of(a - b for a, b in zip(weights(model), before, strict=True))
        assert monitor_of(target).total_norm == pytest.approx(moved / 0.1, rel=1e-4)
    assert monitor_of(target).step == 4


def test_sam_skips_a_bad_second_gradient() -> None:
    model = make_model()
    optimizer = Sam(model.parameters(), torch.optim.SGD, lr=0.1)
    gradstat.attach(optimizer.inner, model, clip="auto")
    backward(model)
    before = weights(model)
    optimizer.step(closure_for(model, optimizer, 1, bad=True))
    for a, b in zip(weights(model), before, strict=True):
        torch.testing.assert_close(a, b)  # up the hill and down again
    assert monitor_of(optimizer.inner).skipped_steps == 1


def test_an_exception_in_a_closure_leaves_everything_in_place() -> None:
    model = make_model()
    optimizer = gradstat.attach(torch.optim.SGD(model.parameters(), lr=0.1), model, clip="auto")
    backward(model)
    expected = grads(model), weights(model)

    def closure() -> Tensor:
        raise RuntimeError("no data")

    with pytest.raises(RuntimeError, match="no data"):
        optimizer.step(closure)
    assert same_bits(grads(model), expected[0])
    assert same_bits(weights(model), expected[1])
    assert monitor_of(optimizer).step == 0
    optimizer.step(closure_for(model, optimizer, 0))
    assert monitor_of(optimizer).step == 1


def test_an_exception_in_a_later_evaluation_gives_gradients_back() -> None:
    model = make_model()
    optimizer = lbfgs(model)
    gradstat.attach(optimizer, model, clip="auto")
    calls = []

    def closure() -> Tensor:
        calls.append(None not in grads(model) or not calls)
        if len(calls) == 2:
            raise RuntimeError("no data")
        loss = closure_for(model, optimizer, 0)()
        return loss

    with pytest.raises(RuntimeError, match="no data"):
        optimizer.step(closure)
    assert calls == [True, True]
    assert None not in grads(model)


def test_an_exception_after_a_bad_evaluation_gives_gradients_back() -> None:
    class FailingLate(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            closure()
            raise RuntimeError("too late")

    model = make_model()
    optimizer = FailingLate(model.parameters(), lr=0.1)
    gradstat.attach(optimizer, model, on_nonfinite="skip")

    def closure() -> None:
        backward(model)
        poison(model)

    with contextlib.suppress(RuntimeError):
        optimizer.step(closure)
    assert None not in grads(model)


def test_a_closure_finds_the_gradients_of_its_last_call() -> None:
    class Twice(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            closure()
            return closure()

    model = make_model()
    optimizer = Twice(model.parameters(), lr=0.1)
    gradstat.attach(optimizer, model, clip="auto")
    seen: list[list[bool]] = []

    def closure() -> Tensor:
        seen.append([grad is None for grad in grads(model)])
        return closure_for(model, optimizer, 0, bad=True)()

    optimizer.step(closure)
    assert seen == [[True] * 4, [False] * 4]
    assert None not in grads(model)


def test_raise_inside_a_closure() -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters())
    gradstat.attach(optimizer, model, on_nonfinite="raise")
    before = weights(model)
    with pytest.raises(
        gradstat.NonFiniteNormError, match=r"at step 1, with NaN or Inf in 0\.weight"
    ):
        optimizer.step(closure_for(model, optimizer, 0, bad=True))
    assert same_bits(weights(model), before)
    assert not optimizer.state


@pytest.mark.filterwarnings("ignore")  # torch has several to say about a traced closure
def test_a_compiled_step_takes_a_closure() -> None:
    torch._dynamo.reset()
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gradstat.attach(optimizer, model)

    @torch._dynamo.disable
    def closure() -> Tensor:
        return closure_for(model, optimizer, 0)()

    compiled = torch.compile(optimizer.step, backend="eager")
    # Traced, our own part would be compiled again for every step that the window holds.
    with torch._dynamo.config.patch(recompile_limit=4, fail_on_recompile_limit_hit=True):
        for _ in range(6):
            compiled(closure)
    assert monitor_of(optimizer).step == 6
    assert monitor_of(optimizer).total_norm == pytest.approx(grad_norm(model))
    assert math.isfinite(monitor_of(optimizer).total_norm)
    torch._dynamo.reset()


def test_a_probed_step_with_a_closure_among_steps_without_is_measured_whole() -> None:
    model = make_model()
    optimizer = gradstat.attach(torch.optim.SGD(model.parameters(), lr=0.1), model)
    for step in range(1, 9):
        if step == 8:
            optimizer.step(closure_for(model, optimizer, seed=step))
        else:
            backward(model, seed=step)
            optimizer.step()
    assert list(monitor_of(optimizer).evidence().probes.steps) == [1, 2, 3, 4, 8]
