"""How a bench is run: what is skipped, what is printed, and what goes into the JSON file."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import machine
import pytest
import torch
from pairing import Clock, Pair, Reading, Side, host_clock, time_pair

import gradstat

# torch.sum wakes threads for more elements than these. Our call does not for work as small as this,
# and whatever runs after threads were woken on a busy machine waits for its turn: it is read in
# pieces.
SERIAL_ELEMENTS = 32000
SMALL_BYTES = 2**18


def pytest_configure(config: pytest.Config) -> None:
    # Our lines replace pytest-benchmark's table, which shows one side only.
    config.option.benchmark_quiet = True


def pytest_sessionstart(session: pytest.Session) -> None:
    # They replace pytest's lines of file names and dots, too.
    if not session.config.option.benchmark_disable:
        session.config.pluginmanager.get_plugin("terminalreporter").showfspath = False


def pytest_report_teststatus(
    report: pytest.TestReport, config: pytest.Config
) -> tuple[str, str, str] | None:
    if report.when == "call" and report.passed and not config.option.benchmark_disable:
        return "passed", "", "PASSED"
    return None


def pytest_benchmark_generate_machine_info() -> dict[str, Any]:
    return machine.machine()


def pytest_benchmark_generate_commit_info() -> dict[str, Any]:
    return machine.commit()


def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    # Single timings would make up most of the file, and nothing reads them.
    for bench in output_json["benchmarks"]:
        for unread in ("params", "param", "options"):
            bench.pop(unread, None)
        bench["stats"].pop("data", None)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("needs_cuda") is None:
        return
    config = gradstat.get_config()
    if not config.cuda:
        reason = f"gradstat has no CUDA kernels here: {config.cuda_reason}"
    elif not machine.has_gpu():
        reason = "torch finds no CUDA device"
    else:
        return
    if os.environ.get("FAIL_WITHOUT_CUDA") == "1":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


@pytest.fixture
def show(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Print a line at once, past pytest's capturing."""
    reporter = request.config.pluginmanager.get_plugin("terminalreporter")
    capture = request.config.pluginmanager.get_plugin("capturemanager")

    def write(line: str) -> None:
        with capture.global_and_fixture_disabled():
            reporter.ensure_newline()
            reporter.write_line(line)

    return write


@pytest.fixture
def compare(
    request: pytest.FixtureRequest, benchmark: Any, show: Callable[[str], None]
) -> Callable[..., None]:
    """Time a pair, print its line and keep its figures. A missed target is no failure."""
    marker = request.node.get_closest_marker("benchmark")
    default = request.config.getoption("benchmark_max_time")
    seconds_per_side = float(marker.kwargs.get("max_time", default) if marker else default)
    min_rounds = int(request.config.getoption("benchmark_min_rounds"))

    def run(pair: Pair, clock: Clock = host_clock) -> None:
        result = time_pair(
            benchmark, pair, clock=clock, seconds_per_side=seconds_per_side, min_rounds=min_rounds
        )
        if result is not None:
            benchmark.extra_info.update(result.to_dict())
            show(result.line())

    return run


@pytest.fixture
def keep(
    benchmark: Any, show: Callable[[str], None]
) -> Callable[[Reading, Callable[[], object]], None]:
    """Print and keep a reading that was taken of some function."""

    def run(reading: Reading, function: Callable[[], object]) -> None:
        benchmark.pedantic(function, rounds=1)
        benchmark.extra_info.update(reading.to_dict())
        show(reading.line())

    return run


@pytest.fixture(scope="session")
def flat() -> torch.Tensor:
    """One flat fp32 tensor of 256 MiB, far more than the caches hold."""
    return torch.empty(64 * 2**20).uniform_()


@pytest.fixture
def read(flat: torch.Tensor) -> Callable[[int], Side]:
    """Give the side that reads that many bytes, or all of `flat` where it is smaller."""

    def side(n_bytes: int) -> Side:
        part = flat[: n_bytes // flat.element_size()]
        if n_bytes <= SMALL_BYTES:
            pieces = part.split(SERIAL_ELEMENTS)
            return Side(
                "torch.sum of as many bytes", lambda: [piece.sum() for piece in pieces], n_bytes
            )
        return Side("torch.sum of as many bytes", part.sum, part.numel() * part.element_size())

    return side
