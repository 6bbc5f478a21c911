"""What is shipped: the compiled module's symbols and libraries, the sdist, the wheel, the version.

One wheel is to serve every torch from 2.10 on. That rests on the module not linking torch, which is
checked here; loading one wheel beside several torches takes as many installations, and is not.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import pytest

import gradstat
from gradstat import _native

ROOT = Path(__file__).resolve().parents[1]
MODULE = Path(_native.__file__)


def output_of(*command: str | Path) -> str:
    """Return what a tool of binutils prints, or skip where there is none."""
    tool = str(command[0])
    if sys.platform != "linux" or shutil.which(tool) is None:
        pytest.skip(f"needs {tool} and a module in ELF")
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


# ---- the compiled module ------------------------------------------------------------------------

# A module that needs no more than these runs wherever Python and a C++ runtime are.
SYSTEM_LIBRARIES = re.compile(
    r"(libstdc\+\+|libgcc_s|libm|libc|libpthread|libdl|librt|ld-linux\S*)\.so"
)


def foreign_libraries(dynamic_section: str) -> list[str]:
    """Return the libraries a module asks for beyond the system's, from ``readelf -d``."""
    needed = re.findall(r"\(NEEDED\).*\[(\S+)\]", dynamic_section)
    return [name for name in needed if not SYSTEM_LIBRARIES.match(name)]


def test_the_module_links_neither_torch_nor_cuda_nor_openmp():
    dynamic_section = output_of("readelf", "-d", MODULE)
    assert "NEEDED" in dynamic_section
    assert foreign_libraries(dynamic_section) == []


def test_a_foreign_library_would_be_seen():
    line = " 0x01 (NEEDED)             Shared library: [{}]\n"
    system = "".join(line.format(name) for name in ("libc.so.6", "ld-linux-x86-64.so.2"))
    assert foreign_libraries(system) == []
    for name in ("libtorch_cpu.so", "libc10.so", "libcudart.so.12", "libgomp.so.1", "libcuda.so.1"):
        assert foreign_libraries(system + line.format(name)) == [name]


def exported(symbols: str) -> set[str]:
    """Return the names from ``nm -D --defined-only``."""
    return {line.split()[-1] for line in symbols.splitlines() if line.strip()}


def test_the_module_exports_its_entry_alone():
    assert exported(output_of("nm", "-D", "--defined-only", MODULE)) == {"PyInit__native"}


def test_another_export_would_be_seen():
    assert exported("00d3a0 T PyInit__native\n00beef T cudaLaunchKernel\n") != {"PyInit__native"}


# ---- code compiled for one instruction set ------------------------------------------------------

OBJECTS = ROOT / "build" / f"dev-{sys.implementation.cache_tag}" / "CMakeFiles" / "_native.dir"
VARIANTS = ("scalar", "avx2", "avx512", "avx512_bf16", "neon")


def stray_symbols(symbols: str, variant: str) -> list[str]:
    """Return what an object file defines beyond its variant's namespace.

    The linker keeps one copy of a weak symbol for everybody: where that is the one compiled for
    AVX-512, every processor without it fails. A function of std is the usual case.

    Args:
        symbols: Output of ``nm --defined-only --demangle``.
        variant: Name of the namespace.
    """
    stray = []
    for line in symbols.splitlines():
        kind, name = re.fullmatch(r"[0-9a-f]* *(\S) (.+)", line).groups()
        # The name of an instance of a template comes after the type it returns.
        own = re.match(rf"(\S+ )?gradstat::{variant}::", name)
        shared = kind in "TDBRWVui" and name != f"gradstat::{variant}::kKernels"
        if shared or (kind in "tbd" and not own):
            stray.append(f"{kind} {name}")
    return stray


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_define_their_own_symbols_alone(variant):
    path = OBJECTS / "csrc" / "cpu" / f"variant_{variant}.cpp.o"
    if not path.exists():
        pytest.skip(f"no object files to look at: `make module` leaves {path.relative_to(ROOT)}")
    symbols = output_of("nm", "--defined-only", "--demangle", path)
    assert f"gradstat::{variant}::kKernels" in symbols
    assert stray_symbols(symbols, variant) == []


STRAY = {
    "weak_function_of_std": "0000 W std::vector<double>::reserve(unsigned long)",
    "weak_object": "0000 V typeinfo for gradstat::avx512::Chunk",
    "unique_object": "0000 u gradstat::avx512::instance()::it",
    "global_function": "0000 T gradstat::avx512::helper(double)",
    "function_of_another_variant": "0000 t gradstat::avx2::(anonymous namespace)::scale_f64(void*)",
    "local_function_of_no_variant": "0000 t gradstat::finish(gradstat::Moments const&)",
}  # fmt: skip
CLEAN = """\
0000000000000000 D gradstat::avx512::kKernels
0000000000000000 t gradstat::avx512::(anonymous namespace)::scale_f64(void*, long, double)
0000000000000040 t void gradstat::avx512::(anonymous namespace)::scale_32<F16>(void*, long, double)
0000000000000000 r .LC0
"""


@pytest.mark.parametrize("line", STRAY.values(), ids=STRAY)
def test_a_stray_symbol_would_be_seen(line):
    assert stray_symbols(CLEAN, "avx512") == []
    assert stray_symbols(CLEAN + line + "\n", "avx512") == [line.removeprefix("0000 ")]


# ---- version and console script -----------------------------------------------------------------


def test_one_version_everywhere():
    declared = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert gradstat.__version__ == metadata.version("gradstat") == declared[1]


def test_the_console_script_is_installed():
    (script,) = metadata.entry_points(group="console_scripts", name="gradstat")
    assert script.value == "gradstat.cli:main"
    assert callable(script.load())
    assert any(Path(sysconfig.get_path("scripts")).glob("gradstat*"))


# ---- sdist and wheel ----------------------------------------------------------------------------


def tracked_files() -> list[str]:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout, to know what belongs to the project")
    # New files count too, before they are committed.
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return sorted(name for name in done.stdout.split("\0") if name and (ROOT / name).is_file())


def run_python(folder: Path, *arguments: str) -> str:
    # Without optimisation and CUDA the module compiles in a third of the time.
    environment = {
        "GRADSTAT_CUDA": "OFF",
        "SKBUILD_CMAKE_BUILD_TYPE": "Debug",
        "SKBUILD_CMAKE_DEFINE": "CMAKE_CXX_FLAGS_DEBUG=-O0",
    }
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env={**os.environ, **environment},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """The unpacked sdist, made of the project's own files and nothing that lies beside them."""
    pytest.importorskip("scikit_build_core")
    checkout = tmp_path_factory.mktemp("checkout")
    for name in tracked_files():
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, checkout / name)
    call = "from scikit_build_core.setuptools.build_meta import build_sdist; build_sdist('dist')"
    run_python(checkout, "-c", call)
    (archive,) = (checkout / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(checkout / "unpacked", filter="data")
    (folder,) = (checkout / "unpacked").iterdir()
    return folder


@pytest.fixture(scope="module")
def wheel(sdist) -> Path:
    """The wheel that pip makes of the sdist."""
    pytest.importorskip("pip")
    folder = sdist.parent / "wheel"
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", str(folder)]
    run_python(sdist, "-m", "pip", "wheel", *options, ".")
    (path,) = folder.glob("*.whl")
    return path


def beginning(names: Iterable[str], *prefixes: str) -> set[str]:
    return {name for name in names if name.startswith(prefixes)}


def test_the_sdist_holds_all_that_a_build_needs(sdist):
    names = {path.relative_to(sdist).as_posix() for path in sdist.rglob("*") if path.is_file()}
    needed = beginning(tracked_files(), "csrc/", "gradstat/")
    needed |= {"CMakeLists.txt", "setup.py", "pyproject.toml", "README.md", "LICENSE"}
    assert needed - names == set()
    assert beginning(names, "build/", ".venv/", ".git/") == set()
    assert {name for name in names if name.endswith((".so", ".o", ".pyc"))} == set()


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    package = {name for name in names if ".dist-info/" not in name}
    assert package - {f"gradstat/{MODULE.name}"} == beginning(tracked_files(), "gradstat/")
    assert f"gradstat/{MODULE.name}" in names
    assert {"gradstat/py.typed", "gradstat/_native.pyi"} <= names
    assert any(name.endswith("/LICENSE") for name in names)


def test_the_wheel_needs_torch_and_numpy_alone(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = [name for name in archive.namelist() if name.endswith("/METADATA")]
    lines = archive.read(name).decode().splitlines()
    needs = {line.split(": ")[1] for line in lines if line.startswith("Requires-Dist:")}
    assert {need for need in needs if "extra ==" not in need} == {"torch>=2.10", "numpy"}


def test_the_wheel_works(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import torch, gradstat\n"
        "print(gradstat.__file__, gradstat.get_total_norm([torch.tensor([3.0, 4.0])]).item())"
    )
    where, norm = run_python(tmp_path, "-c", program).split()
    assert Path(where).is_relative_to(tmp_path)
    assert norm == "5.0"
