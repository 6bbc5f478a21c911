"""What a notebook shows in place of a repr: HTML, with every text escaped."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest
import torch
from run_logs import FINDINGS
from torch import nn

import gradstat

VOID = {"br", "img"}


class Balance(HTMLParser):
    """Collects the texts of HTML and makes sure that each element is closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.tags: set[str] = set()
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_table():
    names = ["<b>bold</b>.weight", 'quote"d', *(f"layer.{n}" for n in range(1500))]
    tensors = [torch.full((2, 2), float(n + 1)) for n in range(len(names))]
    table = gradstat.tensor_stats(tensors, names)
    shown = Balance(table._repr_html_())
    assert {"<b>bold</b>.weight", 'quote"d', "layer.1499", "total"} <= set(shown.texts)
    assert "b" not in shown.tags
    assert "... 502 more layers" in shown.texts
    assert any(text.startswith("total norm") for text in shown.texts)


def test_missing_gradient():
    model = nn.Linear(2, 2)
    assert {"weight", "bias"} <= set(Balance(gradstat.grad_stats(model)._repr_html_()).texts)


def test_activations():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    monitor = gradstat.ActivationMonitor(model, every=1)
    model(torch.randn(8, 4))
    shown = Balance(monitor.table()._repr_html_())
    assert "dead" in shown.texts
    assert monitor.table().names[0] in shown.texts
    monitor.remove()


def test_monitor():
    model = nn.Linear(4, 2)
    optimizer = gradstat.attach(torch.optim.SGD(model.parameters(), lr=0.1), model)
    monitor = optimizer.gradstat
    assert Balance(monitor._repr_html_()).texts == [repr(monitor)]
    for _ in range(10):
        monitor.observe(loss=float("nan"))
        model(torch.full((8, 4), float("nan"))).sum().backward()
        optimizer.step()
    shown = Balance(monitor._repr_html_())
    assert {"weight", "bias"} <= set(shown.texts)
    assert {finding.code for finding in monitor.diagnose()} <= set(shown.texts)
    assert monitor.diagnose()


@pytest.mark.parametrize("finding", FINDINGS, ids=lambda finding: finding.code)
def test_finding(finding):
    shown = Balance(finding._repr_html_())
    text = "".join(shown.texts)
    for part in (finding.code, finding.explanation, *finding.remedy, *finding.layers):
        assert part in text


def test_check():
    model = nn.Linear(4, 2)
    batch = (torch.randn(16, 4), torch.randint(0, 2, (16,)))
    report = gradstat.check(model, nn.functional.cross_entropy, batch, overfit_steps=5)
    shown = Balance(report._repr_html_())
    assert {measure.name for measure in report.measures} <= set(shown.texts)
