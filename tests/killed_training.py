"""Trains with a run log and is killed, again and again; checks what is left after each time.

One process imports torch once and forks those that are killed.

    python tests/killed_training.py PATH TIMES
"""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import struct
import sys
import time

import torch
from small_training import make_model, monitor_of, sgd, train

import gradstat
from gradstat.runlog import pump

pump.PATIENCE = 600.0  # what is told to be kept is kept, however slow the machine is

STEP = struct.Struct("i")


def train_until_killed(path: str, told: int) -> None:
    """Train, and write the number of each step that is known to be kept."""
    model = make_model()
    optimizer = gradstat.attach(sgd(model), model, log=path, log_every=1)
    log, step = monitor_of(optimizer).log, 0
    assert log is not None
    os.write(told, STEP.pack(0))
    while True:
        train(model, optimizer, random.randint(1, 5), step)
        step = monitor_of(optimizer).step
        log.flush()
        os.write(told, STEP.pack(step))


def run_and_kill(path: str, *, keeps_some: bool) -> int:
    """Return the last step that the process has said to be kept.

    Args:
        path: The run log.
        keeps_some: Let it live until it has kept a step, however slow the machine is.
    """
    told, tells = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            train_until_killed(path, tells)
        finally:
            os._exit(1)
    os.close(tells)
    assert os.read(told, STEP.size) == STEP.pack(0), "the child could not begin"
    first = os.read(told, STEP.size) if keeps_some else b""
    time.sleep(random.uniform(0.0, 0.2))
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    with os.fdopen(told, "rb") as pipe:
        rest = first + pipe.read()
    return STEP.unpack(rest[-STEP.size :])[0] if rest else 0


def main(path: str, times: int) -> None:
    torch.set_num_threads(1)
    model = make_model()
    train(model, gradstat.attach(sgd(model), model), 1)  # what is imported late is imported once
    kept: dict[int, int] = {}
    for time_ in range(times):
        random.seed(time_)
        last = run_and_kill(path, keeps_some=time_ % 3 > 0)
        with gradstat.open_run(path) as run:
            assert run.status == "interrupted"
            assert run._rows("PRAGMA integrity_check") == [("ok",)]
            steps = run.steps["step"].tolist()
            tables = run.table("l2")[0].tolist()
            session = len(run.sessions)
        if last:
            kept[session] = last
            assert steps == list(range(1, len(steps) + 1))
            assert len(steps) >= last
            assert tables == steps
        connection = sqlite3.connect(path)
        counts = dict(connection.execute("SELECT session, count(*) FROM steps GROUP BY session"))
        connection.close()
        for older, count in kept.items():
            assert counts.get(older, 0) >= count
        kept |= counts
    assert len(kept) > times // 2


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
