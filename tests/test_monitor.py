"""The monitor: window, weights and updates, observations, callbacks, alarms, memory."""

from __future__ import annotations

import copy
import gc
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from small_training import (
    OPTIMIZERS,
    backward,
    grad_norm,
    loss_of,
    make_model,
    monitor_of,
    norm_of,
    poison,
    sgd,
    train,
    weights,
)

import gradstat
from gradstat._window import Window


def attached(**options: Any) -> tuple[torch.nn.Sequential, torch.optim.Optimizer]:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return model, gradstat.attach(optimizer, model, **options)


def test_before_the_first_step() -> None:
    _, optimizer = attached(weights=True, updates=True)
    monitor = monitor_of(optimizer)
    assert (monitor.step, monitor.every, monitor.names, monitor.last) == (0, 1, (), None)
    numbers = (monitor.total_norm, monitor.clip_coef, monitor.clip_threshold, monitor.clip_rate)
    assert all(math.isnan(number) for number in numbers)
    assert (monitor.skipped_steps, monitor.skipped_in_a_row, monitor.scaler_overflows) == (0, 0, 0)
    assert monitor.window.shape == (0, 0, 12)
    assert monitor.totals.shape == (0, 12)
    assert monitor.decisions.shape == (0, 6)
    assert monitor.update_ratio.shape == (0, 0)
    assert not monitor.already_clipped
    assert repr(monitor) == "Monitor(step=0, parameters=0, clip=None)"


def test_numbers_without_a_policy() -> None:
    model, optimizer = attached()
    train(model, optimizer, 3)
    monitor = monitor_of(optimizer)
    assert (monitor.clip_coef, monitor.clip_rate) == (1.0, 0.0)
    assert monitor.clip_threshold == math.inf
    assert repr(monitor) == "Monitor(step=3, parameters=4, clip=None)"


def test_clip_rate_counts_clipped_steps() -> None:
    model, optimizer = attached(clip=gradstat.GlobalNorm(1.0), on_nonfinite="skip")
    for step in range(8):
        backward(model, step, scale=100.0 if step < 2 else 1e-3)
        if step == 7:
            poison(model)
        optimizer.step()
    assert monitor_of(optimizer).clip_rate == 2 / 8


def test_the_window_holds_the_last_tables() -> None:
    model, optimizer = attached(window=5)
    norms, tables = [], []
    for step in range(12):
        backward(model, step)
        norms.append(grad_norm(model))
        tables.append(gradstat.grad_stats(model).data.numpy().copy())
        optimizer.step()
    monitor = monitor_of(optimizer)
    assert list(monitor.recorded_steps) == [8, 9, 10, 11, 12]
    assert monitor.columns[:3] == ("numel", "zeros", "nans")
    assert monitor.window.shape == (5, 4, 12)
    assert (monitor.window == np.stack(tables[-5:])[:, :-1]).all()
    assert (monitor.totals == np.stack(tables[-5:])[:, -1]).all()
    assert monitor.decisions[:, 0] == pytest.approx(norms[-5:], rel=1e-9)
    with pytest.raises(ValueError, match="weights must be asked for to be recorded; use gradstat"):
        _ = monitor.weight_window
    with pytest.raises(
        ValueError, match=r"updates must be asked for .*attach\(\.\.\., updates=True"
    ):
        _ = monitor.update_ratio


def test_what_is_read_is_a_copy() -> None:
    model, optimizer = attached(window=2)
    train(model, optimizer, 2)
    monitor = monitor_of(optimizer)
    window, last = monitor.window, monitor.last
    assert last is not None
    before = window.copy(), monitor.total_norm
    train(model, optimizer, 3, 2)
    assert (window == before[0]).all()
    assert last.total_norm == before[1]
    assert last.total_norm != monitor.total_norm
    window[:] = 0
    assert (monitor.window[..., 0] > 0).all()


def test_a_parameter_without_a_gradient_is_a_row_of_nan() -> None:
    model, optimizer = attached()
    backward(model)
    model[0].bias.grad = None
    optimizer.step()
    monitor = monitor_of(optimizer)
    assert np.isnan(monitor.window[0, 1]).all()
    assert np.isfinite(monitor.window[0, [0, 2, 3]]).all()
    assert np.isfinite(monitor.totals).all()


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("every", [1, 3])
def test_updates_match_the_change_of_the_weights(make: Any, every: int) -> None:
    model = make_model()
    optimizer = gradstat.attach(
        make(model.parameters()), model, clip="auto", updates=True, every=every
    )
    ratios, tables = [], []
    for step in range(7):
        backward(model, step)
        if step == 3:
            poison(model)
        before = weights(model)
        optimizer.step()
        if step % every == 0:
            changes = [a - b for a, b in zip(weights(model), before, strict=True)]
            ratios.append(
                [norm_of([c]) / norm_of([b]) for c, b in zip(changes, before, strict=True)]
            )
            tables.append(gradstat.tensor_stats(before).data[:-1].numpy())
    monitor = monitor_of(optimizer)
    assert monitor.update_ratio == pytest.approx(np.array(ratios), rel=1e-6)
    assert (monitor.weight_window == np.stack(tables)).all()
    signs = np.sign(monitor.update_window[0, :, monitor.columns.index("sum")])
    if every == 1:
        assert (monitor.update_ratio[3] == 0).all()  # the skipped step
    assert np.isin(signs, (-1, 1)).all()


def test_updates_have_the_sign_of_the_change() -> None:
    parameter = torch.nn.Parameter(torch.ones(4))
    optimizer = gradstat.attach(torch.optim.SGD([parameter], lr=0.5), updates=True)
    parameter.grad = torch.ones(4)
    optimizer.step()
    monitor = monitor_of(optimizer)
    assert monitor.update_window[0, 0, monitor.columns.index("sum")] == -2.0
    assert monitor.update_ratio[0, 0] == pytest.approx(0.5)


def test_weights_alone() -> None:
    model, optimizer = attached(weights=True, every=2)
    before = gradstat.tensor_stats(model).data[:-1].numpy().copy()
    train(model, optimizer, 2)
    monitor = monitor_of(optimizer)
    assert (monitor.weight_window == before).all()
    with pytest.raises(ValueError, match="updates must be asked for"):
        _ = monitor.update_window


def test_a_step_that_raised_leaves_no_update_behind() -> None:
    model, optimizer = attached(updates=True, on_nonfinite="raise", every=2)
    train(model, optimizer, 2)
    backward(model)
    poison(model)
    with pytest.raises(gradstat.NonFiniteNormError):
        optimizer.step()
    with torch.no_grad():
        model[0].weight += 100.0  # no update of an optimizer
    train(model, optimizer, 1)
    assert monitor_of(optimizer).update_ratio.max() < 1


def test_a_step_without_gradients_leaves_the_last_update_alone() -> None:
    model, optimizer = attached(updates=True)
    train(model, optimizer, 1)
    ratio = monitor_of(optimizer).update_ratio
    optimizer.zero_grad()
    with pytest.warns(RuntimeWarning, match="no parameter had a gradient"):
        optimizer.step()
    assert (monitor_of(optimizer).update_ratio == ratio).all()


def test_a_window_moves_to_another_device() -> None:
    window = Window(["a"], torch.device("cpu"), 3, weights=True, updates=False)
    window.open(1)
    window.move(torch.device("meta"))
    assert window.device.type == "meta"
    assert window.tables[window.newest].is_meta
    assert list(window.steps) == [1]


# ---- observe -------------------------------------------------------------------------------------


def test_observe_takes_numbers_and_tensors() -> None:
    model, optimizer = attached()
    monitor = monitor_of(optimizer)
    train(model, optimizer, 2)
    loss = loss_of(model, 0)
    monitor.observe(
        loss=loss,
        val_loss=0.25,
        count=3,
        flag=True,
        score=np.float32(1.5),
        correct=np.bool_(True),
        hits=torch.tensor(7),
        outputs=torch.tensor([[1.0, -2.0], [0.0, math.nan]], dtype=torch.float16),
        targets=torch.tensor([0, 1, 2, 2]),
        mask=torch.tensor([True, False]),
        nothing=None,
    )
    value = {name: monitor.observed(name)[0].value for name in ("loss", "hits")}
    assert value == {"loss": loss.item(), "hits": 7}
    for name, number in (("val_loss", 0.25), ("count", 3), ("flag", 1), ("score", 1.5)):
        assert monitor.observed(name)[0].value == number
    assert monitor.observed("correct")[0].value == 1.0
    outputs = monitor.observed("outputs")[0]
    assert outputs.step == 2
    assert isinstance(outputs.value, gradstat.StatTable)
    assert (outputs.value["outputs"].nans, outputs.value["outputs"].abs_max) == (1, 2.0)
    targets = monitor.observed("targets")[0].value
    assert isinstance(targets, gradstat.StatTable)
    assert (targets["targets"].sum, targets["targets"].zeros) == (5.0, 1)
    assert isinstance(monitor.observed("mask")[0].value, gradstat.StatTable)
    assert monitor.observed("nothing") == []
    assert monitor.observed("unknown") == []


def test_a_loss_without_a_number_is_not_known() -> None:
    _, optimizer = attached()
    monitor = monitor_of(optimizer)
    outputs = torch.ones(4, 2)
    monitor.observe(loss=torch.ones((), device="meta"), outputs=outputs, targets=outputs)
    monitor.observe(loss=1.0)
    assert np.isnan(monitor.evidence().loss.values).tolist() == [True, False]
    assert np.isnan(monitor.evidence().batches[0].loss)


def test_what_was_observed_does_not_change_with_the_tensor() -> None:
    _, optimizer = attached()
    monitor = monitor_of(optimizer)
    value = torch.tensor(1.0)
    monitor.observe(metric=value)
    value.add_(1)
    assert monitor.observed("metric")[0].value == 1.0


def test_observe_does_not_read_a_tensor() -> None:
    _, optimizer = attached()
    nothing_to_read = torch.zeros((), device="meta")
    monitor_of(optimizer).observe(loss=nothing_to_read)
    assert monitor_of(optimizer).observed("loss")[0].value.is_meta


def test_observe_refuses_all_or_nothing() -> None:
    _, optimizer = attached()
    monitor = monitor_of(optimizer)
    with pytest.raises(
        TypeError, match=r"observe\(notes=\.\.\.\) must be a number or a tensor, got str; pass"
    ):
        monitor.observe(loss=1.0, notes="good")
    assert monitor.observed("loss") == []


UNREADABLE: dict[str, Callable[[], Any]] = {
    "object": object,
    "text": lambda: "a batch of words",
    "array": lambda: np.ones((8, 4)),
    "large int": lambda: 10**400,
    "meta": lambda: torch.zeros(8, 4, device="meta"),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "sparse and large": lambda: torch.sparse_coo_tensor(
        torch.zeros(2, 1).long(), [1.0], (2**20, 2**20), check_invariants=True
    ),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("name", ["inputs", "outputs", "targets"])
@pytest.mark.parametrize("make", UNREADABLE.values(), ids=UNREADABLE)
def test_a_batch_that_cannot_be_read_is_passed_over(
    name: str, make: Callable[[], Any], caplog: pytest.LogCaptureFixture
) -> None:
    model, optimizer = attached()
    monitor = monitor_of(optimizer)
    for step in range(10):
        monitor.observe(loss=1.0, **{name: make()})
        train(model, optimizer, 1, step)
    assert len(monitor.observed("loss")) == 10
    assert monitor.observed(name) == []
    monitor.diagnose()
    assert name in str(monitor.coverage())
    [record] = caplog.records
    is_number = isinstance(make(), int)
    why = "int too large" if is_number else "it must be a tensor of numbers in memory, got "
    assert record.getMessage().startswith(f"gradstat passes over observe({name}=...): {why}")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("kind", ["meta", "nested"])
def test_a_metric_that_cannot_be_read_is_passed_over(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    _, optimizer = attached()
    monitor_of(optimizer).observe(metric=UNREADABLE[kind](), loss=1.0)
    assert monitor_of(optimizer).observed("metric") == []
    assert len(monitor_of(optimizer).observed("loss")) == 1
    assert "observe(metric=...): every tensor must hold" in caplog.text


@pytest.mark.filterwarnings("ignore:Sparse CS")
@pytest.mark.parametrize("layout", ["coo", "csr", "csc", "bsr"])
def test_small_sparse_batches_are_looked_at(layout: str) -> None:
    dense = torch.eye(8)[:, :4]
    sparse = {
        "coo": dense.to_sparse(),
        "csr": dense.to_sparse_csr(),
        "csc": dense.to_sparse_csc(),
        "bsr": dense.to_sparse_bsr((2, 2)),
    }[layout]
    _, optimizer = attached()
    monitor_of(optimizer).observe(inputs=sparse)
    [batch] = monitor_of(optimizer).evidence().batches
    assert batch.inputs is not None
    assert (batch.inputs == dense.numpy()).all()


@pytest.mark.filterwarnings("ignore:ComplexHalf support")
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint16, torch.complex32])
def test_tables_of_rare_dtypes(dtype: torch.dtype) -> None:
    _, optimizer = attached()
    value = torch.ones(8, 4, dtype=torch.complex64 if dtype.is_complex else None).to(dtype)
    monitor_of(optimizer).observe(inputs=value, metric=value)
    for name in ("inputs", "metric"):
        [seen] = monitor_of(optimizer).observed(name)
        assert isinstance(seen.value, gradstat.StatTable)
        assert seen.value.total.l2 == pytest.approx(32**0.5)


def test_observations_are_bounded_and_hold_no_graph() -> None:
    model, optimizer = attached(window=4)
    monitor = monitor_of(optimizer)
    for step in range(1200):
        monitor.observe(loss=float(step), outputs=model(torch.ones(3, 6)))
        train(model, optimizer, 1, step)
    losses = [seen.value for seen in monitor.observed("loss")]
    assert losses[-512:] == list(range(688, 1200))
    assert losses[0] == 0
    assert 512 + 256 <= len(losses) < 512 + 512
    assert losses == sorted(losses)
    tables = [seen.value for seen in monitor.observed("outputs")]
    assert 20 <= len(tables) <= 40
    assert all(isinstance(t, gradstat.StatTable) and t.data.grad_fn is None for t in tables)


# ---- callbacks and memory ------------------------------------------------------------------------


def test_callbacks_run_after_each_step_in_order() -> None:
    model, optimizer = attached(every=2)
    monitor = monitor_of(optimizer)
    calls: list[tuple[str, int, float]] = []

    @monitor.on_step
    def first(seen: gradstat.Monitor) -> None:
        calls.append(("first", seen.step, seen.total_norm))

    assert monitor.on_step(lambda seen: calls.append(("second", seen.step, 0.0))) is not None
    assert first is not None
    norms = []
    for step in range(3):
        backward(model, step)
        norms.append(grad_norm(model))
        optimizer.step()
    assert [call[:2] for call in calls] == [
        (name, step) for step in (1, 2, 3) for name in ("first", "second")
    ]
    assert [c[2] for c in calls if c[0] == "first"] == pytest.approx([norms[0], norms[0], norms[2]])


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda value: pickle.loads(pickle.dumps(value))}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_copy_keeps_what_is_known(copied: Any) -> None:
    model = make_model()
    scaler = torch.amp.GradScaler("cpu")
    optimizer = gradstat.attach(sgd(model), model, clip="auto", updates=True, scaler=scaler)
    monitor = monitor_of(optimizer)
    monitor.on_step(lambda monitor: monitor.observe(loss=torch.ones(3)))
    train(model, optimizer, 3)
    twin = copied(monitor)
    train(model, optimizer, 1, 3)
    assert (twin.step, list(twin.recorded_steps)) == (3, [1, 2, 3])
    np.testing.assert_array_equal(twin.window, monitor.window[:3])
    np.testing.assert_array_equal(twin.update_ratio, monitor.update_ratio[:3])
    assert twin.total_norm == monitor.decisions[2, 0]
    assert 0 < twin.clip_rate <= 1
    assert len(twin.observed("loss")) == 3
    assert twin.state_dict()["step"] == 3
    assert len(pickle.dumps(twin)) < 4 * 100 * 5 * 12 * 8


def test_memory_is_bounded() -> None:
    model, optimizer = attached(window=10, updates=True, clip="auto")

    def held() -> int:
        gc.collect()
        plain = (torch.Tensor, torch.nn.Parameter)  # others may be left from other tests
        return sum(thing.nbytes for thing in gc.get_objects() if type(thing) in plain)

    def peak(steps: int) -> int:
        sizes = []
        for _ in range(steps // 32):
            train(model, optimizer, 32)
            optimizer.zero_grad()
            sizes.append(held())
        return max(sizes)

    first = peak(8 * 80)  # the probes are thinned out twice
    assert peak(8 * 80) <= 1.02 * first  # other tests leave a little behind


def test_probing_that_gives_up_says_why(caplog: pytest.LogCaptureFixture) -> None:
    weight = torch.nn.Parameter(torch.ones(3).to(torch.float8_e5m2), requires_grad=False)
    model = make_model()
    model.register_parameter("eighth", weight)
    optimizer = gradstat.attach(torch.optim.SGD(model.parameters(), lr=0.1), model)
    train(model, optimizer, 3)
    (record,) = [r for r in caplog.records if "probes no step" in r.message]
    assert "float8_e5m2" in record.message.lower()
    covered = monitor_of(optimizer).coverage()
    assert covered["parameters-not-updating"].startswith("needs steps (not probed: ")
    assert "float8_e5m2" in covered["parameters-not-updating"].lower()
    assert monitor_of(optimizer).step == 3
