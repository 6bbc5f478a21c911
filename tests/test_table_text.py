"""Tables as text."""

from __future__ import annotations

import inspect
import io
import math
import re
import sys

import numpy as np
import pytest
from tables import (
    NAMES,
    arrays_of,
    histogram_of,
    raw_table,
    variants,
)

from gradstat import render
from gradstat.errors import (
    ArgumentValueError,
)
from gradstat.table import StatTable


@pytest.fixture
def arrays():
    return arrays_of(0)


@pytest.fixture
def table(arrays):
    return StatTable(NAMES, raw_table(arrays), histogram_of(arrays))


def test_plain_text(table):
    assert table.render(width=120, plain=True).splitlines() == [
        "  layer            numel        l2       rms       mean       std       max  zeros"
        "  dead rows  nan  inf",
        "-" * 103,
        "  embed.weight       120  5.78e+00  5.27e-01  -2.16e-02  5.27e-01  2.33e+00  65.0%"
        "      13/20    0    0",
        "  layers.0.weight     63  2.37e+01  2.99e+00   2.98e+00  9.31e-02  3.18e+00     0%"
        "        0/7    0    0",
        "  layers.0.bias    no gradient",
        "! layers.1.weight     20  4.48e+00  1.09e+00  -1.34e-01  1.08e+00  2.37e+00     0%"
        "        0/4    1    2",
        "  head.weight          6  1.82e-30  7.45e-31  -9.03e-32  7.39e-31  1.29e-30     0%"
        "        0/2    0    0",
        "-" * 103,
        "  total              209  2.48e+01  1.73e+00   8.89e-01  1.48e+00  3.18e+00  37.3%"
        "      13/33    1    2",
        "total norm nan (finite part 24.8) over 5 layers, 1 without gradient",
        "! NaN or Inf in 1 layer: layers.1.weight",
    ]  # fmt: skip


def deep_table(count=40):
    rng = np.random.default_rng(1)
    names = [
        f"transformer.encoder.layers.{i}.self_attention.out_projection.weight" for i in range(count)
    ]
    arrays = [rng.normal(size=(3, 5)) * 10.0**-i for i in range(count)]
    arrays[7] = None
    arrays[20][0, 0] = math.nan
    return StatTable(names, raw_table(arrays))


@pytest.mark.parametrize("width", [24, 40, 60, 80, 100, 120, 200])
def test_lines_fit(table, width):
    for shown in (table, deep_table(), variants()["average"], variants()["odd names"]):
        lines = shown.render(width=width, plain=True).splitlines()
        assert max(map(len, lines)) <= width
        assert all(line.isprintable() for line in lines)


def test_eighty_columns_keep_what_matters():
    text = deep_table().render(width=80, plain=True)
    header, rule, *lines = text.splitlines()
    assert header.split() == ["layer", "l2", "max", "zeros", "dead", "rows", "nan", "inf"]
    assert set(rule) == {"-"}
    names = [line[2:].split()[0] for line in lines[:40]]
    assert len(set(names)) == 40  # cut where they differ
    assert names[0] == "...0.self_atten...ction.weight"
    assert lines[7].split()[1:] == ["no", "gradient"]
    assert [line for line in lines[:40] if line.startswith("!")] == [lines[20]]
    assert lines[-1].startswith("! NaN or Inf in 1 layer: transformer.encode")
    healthy = StatTable(["w"], raw_table([np.ones((2, 2))])).render(width=80, plain=True)
    assert "std" in healthy
    assert "nan" not in healthy.splitlines()[0]
    assert healthy.splitlines()[-1] == "total norm 2 over 1 layer, no NaN or Inf"


def test_max_rows():
    table = deep_table()
    lines = table.render(width=80, max_rows=6, plain=True).splitlines()
    assert [line.split()[0][:5] for line in lines[2:5]] == ["...0.", "...1.", "...2."]
    assert lines[5] == "... 34 more layers, 1 with NaN or Inf"
    assert [line.split()[0][:5] for line in lines[6:9]] == ["...37", "...38", "...39"]
    assert table.render(width=80, max_rows=40, plain=True) == table.render(width=80, plain=True)
    assert table.render(max_rows=1, plain=True).count("\n") == 7
    with pytest.raises(ArgumentValueError, match="max_rows must be at least 1, got 0"):
        table.render(max_rows=0)


def test_numbers():
    counts = (0, 7, 99999, 0.5, 123456, 999_499, 1_234_567, 2.5e9, 7e12)
    assert [render._count(x) for x in counts] == [
        "0", "7", "99999", "0.5", "123k", "999k", "1.23M", "2.5G", "7T",
    ]  # fmt: skip
    assert [render._percent(x) for x in (0.0, 1e-9, 0.123, 0.99999, 1.0, math.nan)] == [
        "0%", "0.1%", "12.3%", "99.9%", "100%", "-",
    ]  # fmt: skip
    assert [render._number(x) for x in (0.0, -1.5, 1e-300, math.inf, math.nan)] == [
        "0", "-1.50e+00", "1.00e-300", "inf", "-",
    ]  # fmt: skip


def test_names_cannot_write_to_the_terminal():
    table = StatTable(["a\x1b[2Jb\nc"], raw_table([np.ones((1, 1))]))
    assert "a?[2Jb?c" in table.render(plain=True)


def test_other_kinds():
    table = StatTable(["w"], raw_table([None]), kind="weight")
    assert "no weight" in table.render(plain=True)
    assert "1 without weight" in table.render(plain=True)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_print_is_plain_unless_stdout_is_a_terminal(table, monkeypatch):
    assert str(table) == table.render(plain=True)
    pytest.importorskip("rich")
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    coloured = str(table)
    assert "\x1b[" in coloured
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == table.render(plain=True)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[" not in str(table)
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert "\x1b[" not in str(table)
    monkeypatch.setattr(sys, "stdout", None)
    assert "\x1b[" not in str(table)


def test_rich_prints_the_table(table):
    console = pytest.importorskip("rich.console").Console(file=io.StringIO(), width=80)
    console.print(table)
    printed = [line.rstrip() for line in console.file.getvalue().splitlines()]
    assert printed == table.render(width=80, plain=True).splitlines()


def test_rendering_needs_no_third_party_at_import():
    source = inspect.getsource(render)
    assert re.findall(r"^(?:import|from) (?!__future__|gradstat)(\w+)", source, re.MULTILINE) == [
        "importlib", "math", "os", "shutil", "sys", "textwrap", "collections", "dataclasses",
        "typing",
    ]  # fmt: skip
