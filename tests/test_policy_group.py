"""A clip program run by several threads, as a block on CUDA runs it: same result, no race."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SANITIZE = ["-fsanitize=thread", "-g"]


def build(target: Path, *flags: str) -> bool:
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    command = [compiler, "-std=c++17", "-O1", "-pthread", *flags, f"-I{HERE.parent / 'csrc'}"]
    command += [str(HERE / "policy_group.cpp"), "-o", str(target)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_group_of_threads_decides_as_one_does(tmp_path: Path) -> None:
    program = tmp_path / "policy_group"
    # A compiler may have no ThreadSanitizer, and a kernel's address layout may not suit it.
    is_sanitized = build(program, *SANITIZE) and _starts(program)
    if not is_sanitized:
        assert build(program)
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "all equal\n"


def _starts(program: Path) -> bool:
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    return "unexpected memory mapping" not in done.stderr
