"""The NEON kernels, compiled for 64-bit Arm and compared with the scalar ones in an emulator."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMPILER = "aarch64-linux-gnu-g++"
EMULATORS = ("qemu-aarch64", "qemu-aarch64-static")
SOURCES = [
    "tests/neon/compare.cpp",
    *(f"csrc/cpu/{name}.cpp" for name in ("dispatch", "moments", "parallel", "scale", "units")),
    *(f"csrc/cpu/variant_{name}.cpp" for name in ("neon", "scalar")),
]


def test_neon_kernels_agree_with_scalar_ones(tmp_path):
    if platform.machine() in ("aarch64", "arm64"):
        pytest.skip("this processor runs the NEON kernels itself: the other tests cover them")
    emulator = next(filter(None, map(shutil.which, EMULATORS)), None)
    if shutil.which(COMPILER) is None or emulator is None:
        pytest.skip(
            f"NEON kernels need {COMPILER} and {EMULATORS[0]}: on Debian or Ubuntu, "
            "apt-get install g++-aarch64-linux-gnu qemu-user"
        )
    program = tmp_path / "compare"
    flags = "-std=c++17 -O2 -ffp-contract=off -DGRADSTAT_HAVE_NEON -static"
    compiled = subprocess.run(
        [COMPILER, *flags.split(), "-o", program, *(ROOT / source for source in SOURCES)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert compiled.returncode == 0, compiled.stderr
    done = subprocess.run(
        [emulator, program], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith(" checks, 0 failures\n")
