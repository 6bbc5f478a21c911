"""The texts of errors: what must hold, what was received and from where, and the remedy."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gradients import Untouched, parameter, parameters
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import gradstat
from gradstat import (
    ArgumentTypeError,
    ArgumentValueError,
    NonFiniteNormError,
    UnsupportedTensorError,
    clip_grad_norm_,
    clip_grad_value_,
    get_total_norm,
    grad_stats,
    tensor_stats,
)

INF, NAN = math.inf, math.nan


def message_of(error: type[Exception], call: Callable[[], object]) -> str:
    with pytest.raises(error) as caught:
        call()
    assert isinstance(caught.value, gradstat.GradstatError)
    return str(caught.value)


# ---- tensors that hold no numbers ---------------------------------------------------------------


class Spread(Tensor):
    """Like a DTensor: one tensor over several ranks."""

    def to_local(self) -> Tensor:
        return self


class Wrapper(Tensor):
    """A subclass that has no memory of its own."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapper:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, *_: Any) -> Any:
        raise NotImplementedError(func)


def fake() -> Tensor:
    with FakeTensorMode():
        return torch.ones(2)


UNSUPPORTED: dict[str, tuple[Callable[[], Tensor], str, str]] = {
    "meta": (lambda: torch.ones(2, device="meta"), "a meta tensor", "materialise it first"),
    "fake": (fake, "a FakeTensor, a tensor subclass", "pass the plain tensor that it wraps"),
    "wrapper": (
        lambda: Wrapper(torch.ones(2)),
        "a Wrapper, a tensor subclass that need not have memory of its own",
        "pass the plain tensor that it wraps",
    ),
    "spread": (
        lambda: torch.ones(2).as_subclass(Spread),
        "a Spread, which is spread over ranks",
        "pass tensor.to_local() for this rank's share",
    ),
    "nested": (
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        "a nested tensor",
        "pass tensor.values()",
    ),
    "quantised": (
        lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
        "a quantised tensor (torch.qint8)",
        "pass tensor.dequantize()",
    ),
    "int64": (lambda: torch.ones(2, dtype=torch.int64), "dtype torch.int64", "tensor.float()"),
    "bool": (lambda: torch.ones(2, dtype=torch.bool), "dtype torch.bool", "tensor.float()"),
    "fp8": (
        lambda: torch.ones(2).to(torch.float8_e4m3fn),
        "dtype torch.float8_e4m3fn",
        "tensor.to(torch.float32)",
    ),
    "sparse_int64": (
        lambda: torch.ones(2, dtype=torch.int64).to_sparse(),
        "dtype torch.int64",
        "tensor.float()",
    ),
    "uninitialised": (
        lambda: nn.LazyLinear(2).weight,
        "an UninitializedParameter, whose shape is not known yet",
        "run one batch through the model first",
    ),
}
NAMES = ("a", "b", "head.bias")
CALLS: dict[str, tuple[Callable[[list[Any]], object], str]] = {
    "tensor_stats": (tensor_stats, "'tensor2'"),
    "tensor_stats_with_names": (lambda ts: tensor_stats(ts, NAMES), "'head.bias'"),
    "tensor_stats_of_a_dict": (
        lambda ts: tensor_stats(dict(zip(NAMES, ts, strict=True))), "'head.bias'"),
    "get_total_norm": (get_total_norm, "tensor 2"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore:.*[Qq]uantiz", "ignore:.*ested")
@pytest.mark.parametrize(("call", "place"), CALLS.values(), ids=CALLS)
@pytest.mark.parametrize(("make", "what", "remedy"), UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_unsupported_tensors(make, what, remedy, call, place):
    beside = [torch.ones(3), torch.ones(2)]
    text = message_of(UnsupportedTensorError, lambda: call([*beside, make()]))
    assert "must hold fp64, fp32, bf16, fp16 or complex numbers in memory" in text
    assert f"got {what}" in text
    assert f" for {place};" in text
    assert remedy in text


WITHOUT_MEMORY = """
import torch, gradstat
freed = torch.ones(3)
freed.untyped_storage().resize_(0)
zeros = torch._efficientzerotensor(3)
functional = torch._to_functional_tensor(torch.ones(3))
for tensor in (freed, zeros, functional):
    try:
        gradstat.tensor_stats([torch.ones(2), tensor])
    except gradstat.UnsupportedTensorError as error:
        print(error)
"""


def test_tensors_without_memory():
    # They say that they are plain ones, and a pointer that leads nowhere may end the process.
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_MEMORY], capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    assert done.stdout.count("got a tensor without memory") == 3
    assert done.stdout.count("for 'tensor1'; measure it while its storage is there") == 3


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor]], object]] = {
    "vmap": lambda look: torch.func.vmap(look)(torch.ones(3, 2)),
    "grad": lambda look: torch.func.grad(lambda x: look(x).sum())(torch.ones(2)),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_tensors_inside_of_a_transform(transform):
    beside = torch.ones(2)

    def look(x: Tensor) -> Tensor:
        get_total_norm([beside, x])
        return x

    text = message_of(UnsupportedTensorError, lambda: transform(look))
    assert "got a tensor inside a torch.func transform for tensor 1;" in text
    assert "measure outside of vmap, grad and the like" in text


def test_gradients_are_named_by_their_parameters():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).to("meta")
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    assert " for '0.weight';" in message_of(UnsupportedTensorError, lambda: grad_stats(model))
    pairs = list(model.named_parameters())
    text = message_of(UnsupportedTensorError, lambda: clip_grad_norm_(pairs, 1.0))
    assert " for '0.weight';" in text
    text = message_of(UnsupportedTensorError, lambda: clip_grad_norm_(model.parameters(), 1.0))
    assert " for parameter 0;" in text


def test_positions_are_those_of_the_list_that_was_passed():
    first, bad = parameter(torch.ones(2)), parameter(torch.ones(2, dtype=torch.float8_e4m3fn))
    text = message_of(UnsupportedTensorError, lambda: clip_grad_norm_([first, first, bad], 1.0))
    assert " for parameter 2;" in text
    third = parameter(torch.ones(1).expand(2))
    text = message_of(ArgumentTypeError, lambda: clip_grad_norm_([first, first, third], 1.0))
    assert " for parameter 2;" in text


# ---- arguments ----------------------------------------------------------------------------------

ONE = torch.ones(1)

# The call, the error, and the words that the text must hold, in order.
BAD_SOURCES: dict[str, tuple[Callable[[], object], type[Exception], list[str]]] = {
    "non_tensor_in_a_list": (
        lambda: grad_stats([parameter(ONE), "x"]),
        ArgumentTypeError,
        ["every item must be a torch.Tensor", "got str for 'param1'", "pass parameters"],
    ),
    "non_tensor_in_a_dict": (
        lambda: grad_stats({"a": ONE, "head.bias": 3}),
        ArgumentTypeError,
        ["every item must be a torch.Tensor", "got int for 'head.bias'", "dict of tensors"],
    ),
    "non_tensor_in_pairs": (
        lambda: grad_stats([("a", parameter(ONE)), ("head.bias", [1.0])]),
        ArgumentTypeError,
        ["every item must be a torch.Tensor", "got list for 'head.bias'"],
    ),
    "non_tensor_when_clipping": (
        lambda: clip_grad_norm_([parameter(ONE), "x"], 1.0),
        ArgumentTypeError,
        ["every item must be a torch.Tensor", "got str for parameter 1"],
    ),
    "non_tensor_in_a_norm": (
        lambda: get_total_norm([ONE, 2.0]),
        ArgumentTypeError,
        ["every item must be a torch.Tensor", "got float for tensor 1"],
    ),
    "a_pair_and_then_a_tensor": (
        lambda: grad_stats([("a", ONE), ONE]),
        ArgumentTypeError,
        ["model_or_params must hold (name, tensor) pairs throughout", "got Tensor at position 1",
         "pass model.named_parameters()"],
    ),
    "a_tensor_and_then_a_pair": (
        lambda: grad_stats([ONE, ("a", ONE)]),
        ArgumentTypeError,
        ["every item must be a torch.Tensor", "got tuple for 'param1'"],
    ),
    "a_pair_without_a_name": (
        lambda: tensor_stats([(0, ONE)]),
        ArgumentTypeError,
        ["tensors must hold (name, tensor) pairs throughout", "got tuple at position 0"],
    ),
    "a_string": (
        lambda: grad_stats("model"),
        ArgumentTypeError,
        ["model_or_params must be a module, tensors, (name, tensor) pairs or a dict", "got str",
         "pass for example model"],
    ),
    "a_number": (lambda: tensor_stats(3), ArgumentTypeError, ["tensors must be", "got int"]),
    "a_method": (
        lambda: clip_grad_norm_(nn.Linear(1, 1).parameters, 1.0),
        ArgumentTypeError,
        ["parameters must be", "got method"],
    ),
    "a_module_to_clip": (
        lambda: clip_grad_norm_(nn.Linear(1, 1), 1.0),
        ArgumentTypeError,
        ["parameters must be tensors", "got the module Linear", "pass module.parameters()"],
    ),
    "a_module_to_clamp": (
        lambda: clip_grad_value_(nn.Linear(1, 1), 1.0),
        ArgumentTypeError,
        ["parameters must be tensors", "got the module Linear", "pass module.parameters()"],
    ),
    "a_module_to_get_total_norm": (
        lambda: get_total_norm(nn.Linear(1, 1)),
        ArgumentTypeError,
        ["tensors must be tensors", "got the module Linear",
         "pass [p.grad for p in module.parameters() if p.grad is not None]"],
    ),
    "names_too_many": (
        lambda: tensor_stats([ONE], ["a", "b"]),
        ArgumentValueError,
        ["names must hold one name for each tensor", "got 2 names for 1 tensors", "same length"],
    ),
    "names_beside_a_dict": (
        lambda: tensor_stats({"a": ONE}, ["a"]),
        ArgumentValueError,
        ["names must be left out", "got both", "list(tensors.values())"],
    ),
    "names_beside_a_module": (
        lambda: tensor_stats(nn.Linear(1, 1), ["a", "b"]),
        ArgumentValueError,
        ["names must be left out", "got both"],
    ),
    "names_as_a_string": (
        lambda: tensor_stats([ONE, ONE], "ab"),
        ArgumentTypeError,
        ["names must be a sequence of str", "got 'ab'", "names=['a', 'b']"],
    ),
    "names_as_a_number": (
        lambda: tensor_stats([ONE], 3),
        ArgumentTypeError,
        ["names must be a sequence of str", "got 3"],
    ),
    "names_that_are_no_strings": (
        lambda: tensor_stats([ONE, ONE], ["a", 1]).names,
        ArgumentTypeError,
        ["names[1] must be a str", "got int"],
    ),
    "names_twice": (
        lambda: tensor_stats([ONE, ONE], ["a", "a"])["a"],
        ArgumentValueError,
        ["names must differ from each other", "got 'a' twice"],
    ),
    "pairs_with_a_name_twice": (
        lambda: grad_stats([("a", parameter(ONE)), ("a", parameter(ONE))]).names,
        ArgumentValueError,
        ["names must differ from each other", "got 'a' twice"],
    ),
}  # fmt: skip


def used_up() -> Any:
    params = nn.Linear(1, 1).parameters()
    list(params)
    return params


for _name, _call in {
    "grad_stats": grad_stats,
    "clip_grad_norm_": lambda params: clip_grad_norm_(params, 1.0),
    "clip_grad_value_": lambda params: clip_grad_value_(params, 1.0),
    "get_total_norm": get_total_norm,
}.items():
    BAD_SOURCES[f"used_up_generator_for_{_name}"] = (
        lambda call=_call: call(used_up()),
        ArgumentValueError,
        [
            "must yield at least one item",
            "a generator that yields none",
            "list(model.parameters())",
        ],
    )


def assert_words_in_order(text: str, words: list[str]) -> None:
    assert re.search(".*".join(map(re.escape, words)), text), text


@pytest.mark.parametrize(("call", "error", "words"), BAD_SOURCES.values(), ids=BAD_SOURCES)
def test_what_is_measured(call, error, words):
    assert_words_in_order(message_of(error, call), words)


NUMBER = 'use float("inf") to disable clipping'
BAD_NUMBERS: dict[str, tuple[Callable[[Any], object], type[Exception], list[str]]] = {
    "max_norm_nan": (
        lambda ps: clip_grad_norm_(ps, NAN),
        ArgumentValueError,
        ["max_norm must be zero or positive", "got nan", NUMBER],
    ),
    "max_norm_negative": (
        lambda ps: clip_grad_norm_(ps, -1),
        ArgumentValueError,
        ["max_norm must be zero or positive", "got -1.0", NUMBER],
    ),
    "max_norm_minus_inf": (
        lambda ps: clip_grad_norm_(ps, -INF),
        ArgumentValueError,
        ["max_norm must be zero or positive", "got -inf"],
    ),
    "max_norm_word": (
        lambda ps: clip_grad_norm_(ps, "large"),
        ArgumentTypeError,
        ["max_norm must be a number", "got str", NUMBER],
    ),
    "max_norm_none": (
        lambda ps: clip_grad_norm_(ps, None),
        ArgumentTypeError,
        ["max_norm must be a number", "got NoneType", NUMBER],
    ),
    "max_norm_two_numbers": (
        lambda ps: clip_grad_norm_(ps, torch.ones(2)),
        ArgumentTypeError,
        ["max_norm must be a number", "got Tensor"],
    ),
    "max_norm_complex": (
        lambda ps: clip_grad_norm_(ps, 1j),
        ArgumentTypeError,
        ["max_norm must be a number", "got complex"],
    ),
    "norm_type_nan": (
        lambda ps: clip_grad_norm_(ps, 1.0, NAN),
        ArgumentValueError,
        ["norm_type must not be NaN", "got nan", "use 2.0 or math.inf"],
    ),
    "norm_type_word": (
        lambda ps: clip_grad_norm_(ps, 1.0, "two"),
        ArgumentTypeError,
        ["norm_type must be a number", "got 'two'", "use 2.0 or math.inf"],
    ),
    "norm_type_none": (
        lambda ps: get_total_norm([p.grad for p in ps], None),
        ArgumentTypeError,
        ["norm_type must be a number", "got None"],
    ),
    "norm_type_two_numbers": (
        lambda ps: get_total_norm([p.grad for p in ps], torch.ones(2)),
        ArgumentTypeError,
        ["norm_type must be a number", "got tensor"],
    ),
    "clip_value_negative": (
        lambda ps: clip_grad_value_(ps, -0.5),
        ArgumentValueError,
        ["clip_value must be zero or positive", "got -0.5", NUMBER],
    ),
    "clip_value_nan": (
        lambda ps: clip_grad_value_(ps, NAN),
        ArgumentValueError,
        ["clip_value must be zero or positive", "got nan"],
    ),
    "clip_value_word": (
        lambda ps: clip_grad_value_(ps, "x"),
        ArgumentTypeError,
        ["clip_value must be a number", "got str"],
    ),
}


@pytest.mark.parametrize(("call", "error", "words"), BAD_NUMBERS.values(), ids=BAD_NUMBERS)
def test_numbers(call, error, words):
    params = parameters([torch.tensor([3.0, 4.0]), torch.tensor([NAN, 1e9])])
    untouched = Untouched(params)
    assert_words_in_order(message_of(error, lambda: call(params)), words)
    untouched.check()


# ---- gradients that cannot be clipped -----------------------------------------------------------


def test_the_layers_that_hold_nan_or_inf_are_named():
    bad = [torch.ones(2), torch.tensor([NAN]), torch.ones(2), torch.tensor([1.0, INF])]
    params = parameters(bad)
    untouched = Untouched(params)

    def call(source: Any) -> str:
        return message_of(
            NonFiniteNormError, lambda: clip_grad_norm_(source, 1.0, error_if_nonfinite=True)
        )

    assert_words_in_order(
        call(params),
        ["the total norm of order 2.0 must be finite for error_if_nonfinite=True", "got nan",
         "(NaN or Inf in parameter 1, parameter 3)", "no gradient was changed",
         "error_if_nonfinite=False"],
    )  # fmt: skip
    assert "(NaN or Inf in 'b', 'd')" in call(dict(zip("abcd", params, strict=True)))
    # Positions count the repeat that is left out.
    assert "(NaN or Inf in parameter 2, parameter 4)" in call([params[0], *params])
    text = message_of(NonFiniteNormError, lambda: get_total_norm(bad, error_if_nonfinite=True))
    assert "(NaN or Inf in tensor 1, tensor 3)" in text
    untouched.check()


def test_a_long_list_of_bad_layers_is_cut():
    params = parameters([torch.tensor([INF])] * 9)
    text = message_of(
        NonFiniteNormError, lambda: clip_grad_norm_(params, 1.0, error_if_nonfinite=True)
    )
    assert "got inf (NaN or Inf in parameter 0, parameter 1, parameter 2, parameter 3, " in text
    assert "parameter 4, ...)" in text


# A gradient that is refused, and the words.
REFUSED: dict[str, tuple[Callable[[], Tensor], list[str]]] = {
    "expanded": (
        lambda: torch.full((1,), 9.0).expand(3),
        ["must not overlap itself in memory", "got an expanded view of shape (3,) for parameter 2",
         "assign grad.contiguous() first"],
    ),
    "fp8": (
        lambda: torch.ones(2).to(torch.float8_e5m2),
        ["must hold", "got dtype torch.float8_e5m2 for parameter 2"],
    ),
    "meta": (lambda: torch.ones(2, device="meta"), ["got a meta tensor for parameter 2"]),
}  # fmt: skip


@pytest.mark.parametrize(
    "clip",
    [
        lambda ps: clip_grad_norm_(ps, 0.1),
        lambda ps: clip_grad_norm_(ps, 0.1, 3.0),
        lambda ps: clip_grad_value_(ps, 0.1),
    ],
    ids=["norm", "norm_of_order_3", "value"],
)
@pytest.mark.parametrize(("make", "words"), REFUSED.values(), ids=REFUSED)
def test_one_bad_gradient_leaves_all_as_they_are(make, words, clip):
    good = parameters([torch.full((3,), 9.0), torch.full((8,), 9.0)[::2]])
    bad = parameter(make()) if make().device.type == "cpu" else nn.Parameter(make())
    bad.grad = make()
    also_good = parameter(torch.full((2,), 9.0))
    untouched = Untouched([*good, also_good])
    text = message_of(ArgumentTypeError, lambda: clip([*good, bad, also_good]))
    assert_words_in_order(text, words)
    untouched.check()


def test_complex_gradients_cannot_be_clamped():
    params = parameters([torch.full((3,), 9.0), torch.tensor([9 + 9j])])
    untouched = Untouched(params)
    text = message_of(ArgumentTypeError, lambda: clip_grad_value_(params, 1.0))
    assert_words_in_order(
        text,
        ["needs real gradients", "got torch.complex64 for parameter 1", "use clip_grad_norm_"],
    )
    untouched.check()


def test_one_except_clause_catches_them_all():
    for call, error, _ in BAD_SOURCES.values():
        assert issubclass(error, gradstat.GradstatError)
        with pytest.raises((ValueError, TypeError)):
            call()


def test_results_need_real_memory():
    param = parameter(torch.ones(3))
    with FakeTensorMode(), pytest.raises(UnsupportedTensorError, match="outside of FakeTensorMode"):
        gradstat.grad_stats([param])


def test_an_order_that_takes_torch_names_the_culprits_too():
    bad = parameters([torch.ones(2), torch.tensor([math.nan, 1.0]), torch.ones(2)])
    with pytest.raises(gradstat.NonFiniteNormError, match=r"NaN or Inf in parameter 1\)"):
        gradstat.clip_grad_norm_(bad, 1.0, norm_type=3.0, error_if_nonfinite=True)


# ---- probes -------------------------------------------------------------------------------------

NET = nn.Linear(3, 2)
SGD = torch.optim.SGD(NET.parameters(), lr=0.1)
PAIR = (torch.ones(8, 3), torch.zeros(8, dtype=torch.long))
CE = nn.functional.cross_entropy


class Uncopyable(nn.Linear):
    def __deepcopy__(self, memo: Any) -> Any:
        raise RuntimeError("no copies")


BAD_PROBES: dict[str, tuple[Callable[[], object], type[Exception], list[str]]] = {
    "no_model": (
        lambda: gradstat.check("net", CE, PAIR),
        ArgumentTypeError,
        ["model must be a torch.nn.Module", "got str"],
    ),
    "lazy_model": (
        lambda: gradstat.check(nn.LazyLinear(2), CE, PAIR),
        ArgumentTypeError,
        ["model must have parameters with values", "got those of a lazy module", "run one batch"],
    ),
    "no_loss": (
        lambda: gradstat.check(NET, batch=PAIR),
        ArgumentValueError,
        ["one of loss_fn and step must be given", "got neither", "pass loss_fn(outputs, targets)"],
    ),
    "two_losses": (
        lambda: gradstat.check(NET, CE, PAIR, step=CE),
        ArgumentValueError,
        ["one of loss_fn and step must be given", "got both"],
    ),
    "loss_no_function": (
        lambda: gradstat.check(NET, "ce", PAIR),
        ArgumentTypeError,
        ["loss_fn must be a function", "got str", "torch.nn.CrossEntropyLoss()"],
    ),
    "no_batch": (
        lambda: gradstat.check(NET, CE),
        ArgumentValueError,
        ["batch must hold tensors", "got NoneType", "next(iter(loader))"],
    ),
    "inputs_alone": (
        lambda: gradstat.check(NET, CE, PAIR[0]),
        ArgumentTypeError,
        ["batch must be (inputs, targets) for loss_fn", "got Tensor", "pass step="],
    ),
    "loss_as_number": (
        lambda: gradstat.check(NET, lambda o, t: CE(o, t).item(), PAIR),
        ArgumentTypeError,
        ["the loss must be a tensor", "got float", "without .item()"],
    ),
    "loss_of_each_row": (
        lambda: gradstat.check(NET, lambda o, t: CE(o, t, reduction="none"), PAIR),
        ArgumentValueError,
        ["the loss must be one number", "got a tensor of shape (8,)", "loss.mean()"],
    ),
    "batch_dim": (
        lambda: gradstat.check(NET, CE, PAIR, batch_dim="rows"),
        ArgumentTypeError,
        ["batch_dim must be an int", "got str", "use 0"],
    ),
    "overfit_steps": (
        lambda: gradstat.check(NET, CE, PAIR, overfit_steps=-1),
        ArgumentValueError,
        ["overfit_steps must be at least 0", "got -1"],
    ),
    "no_copies": (
        lambda: gradstat.check(Uncopyable(3, 2), CE, PAIR),
        ArgumentTypeError,
        ["must be fit for copy.deepcopy", "got RuntimeError: no copies", "keep tensors with"],
    ),
    "no_optimizer": (
        lambda: gradstat.lr_range_test(NET, NET, CE, [PAIR]),
        ArgumentTypeError,
        ["optimizer must be a torch.optim.Optimizer", "got Linear"],
    ),
    "optimizer_of_another_model": (
        lambda: gradstat.lr_range_test(nn.Linear(3, 2), SGD, CE, [PAIR]),
        ArgumentValueError,
        ["optimizer must hold parameters of model", "got a SGD with none"],
    ),
    "no_loader": (
        lambda: gradstat.lr_range_test(NET, SGD, CE, 5),
        ArgumentTypeError,
        ["loader must give batches", "got int", "pass a DataLoader"],
    ),
    "empty_loader": (
        lambda: gradstat.lr_range_test(NET, SGD, CE, []),
        ArgumentValueError,
        ["loader must give batches", "got none"],
    ),
    "few_steps": (
        lambda: gradstat.lr_range_test(NET, SGD, CE, [PAIR], steps=3),
        ArgumentValueError,
        ["steps must be at least 10", "got 3"],
    ),
    "start_after_end": (
        lambda: gradstat.lr_range_test(NET, SGD, CE, [PAIR], start=1.0, end=0.1),
        ArgumentValueError,
        ["start must be positive and less than end", "got start=1.0 and end=0.1"],
    ),
    "start_word": (
        lambda: gradstat.lr_range_test(NET, SGD, CE, [PAIR], start="low"),
        ArgumentTypeError,
        ["start must be a number", "got str"],
    ),
    "splits_one": (
        lambda: gradstat.noise_scale(NET, CE, PAIR, splits=1),
        ArgumentValueError,
        ["splits must be at least 2", "got 1"],
    ),
    "more_splits_than_rows": (
        lambda: gradstat.noise_scale(NET, CE, PAIR, splits=9),
        ArgumentValueError,
        ["batch must hold tensors with at least splits=9 rows", "got 8 rows", "fewer splits"],
    ),
    "frozen": (
        lambda: gradstat.noise_scale(nn.Linear(3, 2).requires_grad_(False), CE, PAIR),
        ArgumentValueError,
        ["model must have parameters that require a gradient", "got none"],
    ),
    "sizes_alike": (
        lambda: gradstat.NoiseScale.from_norms(1.0, 1.0, 32, 32),
        ArgumentValueError,
        ["small_size must be positive and less than big_size", "got 32 and 32"],
    ),
}


@pytest.mark.parametrize(("call", "error", "words"), BAD_PROBES.values(), ids=BAD_PROBES)
def test_probes(call, error, words):
    assert_words_in_order(message_of(error, call), words)
