"""``gradstat bench``: what it is given, what it prints, and what it says of bad words."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from gradstat import cli
from gradstat.overhead import workload

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def bench(*words: str) -> int:
    return cli.main(["bench", "--steps", "1", "--rounds", "2", "--threads", "1", *words])


FACTORIES = """
import torch
from torch import nn
def net(): return nn.Linear(4, 3)
def lstm(): return nn.LSTM(4, 3)
def number(): return 3
def picky(size): return nn.Linear(size, size)
def words(): return nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 3))
class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 1)
    def forward(self, a, b): return {"loss": 1, "logits": self.layer(a) + b}
def loss(outputs): return outputs.abs().mean()
def no_loss(outputs): return 3.0
data = 3
"""


@pytest.fixture
def factories(tmp_path, monkeypatch):
    (tmp_path / "my_models.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop("my_models", None)


WORKS = {
    "plain": ("net", "8x4"),
    "loss_of_its_own": ("net", "8x4", "--loss", "my_models:loss"),
    "classes": ("net", "8x4", "--loss", "cross-entropy", "--clip", "1.0"),
    "tuple_of_outputs": ("lstm", "7x8x4", "--loss", "mse", "--clip", "none"),
    "tokens": ("words", "2x5:int10", "--loss", "cross-entropy", "--fused"),
    "two_inputs": ("Two", "8x4,8x1", "--optimizer", "SGD", "--lr", "0.1", "--no-log"),
}


@pytest.mark.usefixtures("factories")
@pytest.mark.parametrize("words", WORKS.values(), ids=WORKS)
def test_bench(capsys, words):
    model, batch, *more = words
    threads = torch.get_num_threads()
    assert bench("--model", f"my_models:{model}", "--batch", batch, "--json", "b.json", *more) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"\nmy_models:{model}, ")
    assert captured.err == ""
    (report,) = json.loads(Path("b.json").read_text())["reports"]
    assert (report["rounds"], report["steps"] % 40) == (2, 0)
    assert [side["name"] for side in report["sides"]] == ["nothing", "clip_grad_norm_", "gradstat"]
    assert ("logging" in captured.out) == ("--no-log" not in words)
    assert {"cpu", "torch", "gradstat", "threads"} <= set(report["machine"])
    assert torch.get_num_threads() == threads


@pytest.mark.usefixtures("factories")
def test_bench_prints_json(capsys):
    assert bench("--model", "my_models:net", "--batch", "8x4", "--json", "-") == 0
    assert json.loads(capsys.readouterr().out)["reports"][0]["model"] == "my_models:net"


FAILURES = {
    "no_batch": ("my_models:net", (), "--batch must be given with --model my_models:net"),
    "no_module": ("nowhere:net", ("--batch", "8x4"), "got ModuleNotFoundError for nowhere:net"),
    "no_name": ("my_models:nope", ("--batch", "8x4"), "got AttributeError for my_models:nope"),
    "no_colon": ("resnet", ("--batch", "8x4"), "package.module:name or one of mlp, cnn, gpt"),
    "no_function": ("my_models:data", ("--batch", "8x4"), "a function or class, got int"),
    "arguments": ("my_models:picky", ("--batch", "8x4"), "without arguments, got TypeError from"),
    "no_model": ("my_models:number", ("--batch", "8x4"), "a torch.nn.Module, got int from"),
    "sizes": ("my_models:net", ("--batch", "8x-4"), "--batch must be sizes, got '8x-4'"),
    "dtype": ("my_models:net", ("--batch", "8x4:int"), "--batch must be sizes, got '8x4:int'"),
    "shape": ("my_models:net", ("--batch", "8x5"), "train on a batch of 8x5, got RuntimeError"),
    "loss": (
        "my_models:net",
        ("--batch", "8x4", "--loss", "my_models:no_loss"),
        "train on a batch of 8x4, got",
    ),
    "loss_name": ("my_models:net", ("--batch", "8x4", "--loss", "l1"), "--loss must be package"),
    "optimizer": ("my_models:net", ("--batch", "8x4", "--optimizer", "lion"), "got 'lion'"),
    "fused": (
        "my_models:net",
        ("--batch", "8x4", "--optimizer", "rprop", "--fused"),
        "--optimizer rprop must take the model's parameters, got TypeError",
    ),
    "clip": ("my_models:net", ("--batch", "8x4", "--clip", "often"), "--clip must be"),
    "device": ("my_models:net", ("--batch", "8x4", "--device", "cup"), "--device must be one"),
    "folder": ("my_models:net", ("--batch", "8x4", "--json", "no/b.json"), "no/b.json"),
}  # fmt: skip


@pytest.mark.usefixtures("factories")
@pytest.mark.parametrize(("model", "words", "message"), FAILURES.values(), ids=FAILURES)
def test_bench_says_what_is_wrong(capsys, model, words, message):
    assert bench("--model", model, *words) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("gradstat bench: error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize("name", workload.BUILT_IN)
def test_models_of_ours_train(name):
    work = workload.make_workload(model=name)
    first = work.step()
    for _ in range(3):
        last = work.step()
    assert last < first
