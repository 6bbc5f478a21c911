"""The rules of docs/design.md that a reader would otherwise have to check by eye.

Each rule is a function of data or of text, so that a test can also show it what breaks it.
"""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from collections import ChainMap
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import gradstat
from gradstat import _native

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "gradstat"

# ---- public names -------------------------------------------------------------------------------


def public_names(module: ModuleType) -> list[str]:
    return sorted(
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    )


def test_all_is_true():
    assert list(gradstat.__all__) == sorted(gradstat.__all__)
    assert list(gradstat.__all__) == public_names(gradstat)


def test_a_name_outside_of_all_would_be_seen():
    module = ModuleType("other")
    vars(module).update({"visible": 1, "_hidden": 2, "submodule": ModuleType("x")})
    assert public_names(module) == ["visible"]


def undocumented(names: Mapping[str, Any]) -> Iterator[str]:
    """Yield every name without a docstring of its own, and every public member of a class."""
    for name, value in names.items():
        # A dataclass without a docstring gets its signature for one.
        if not value.__doc__ or value.__doc__.startswith(f"{name}("):
            yield name
        if inspect.isclass(value):
            own = [base for base in value.__mro__ if base.__module__.startswith("gradstat.")]
            for key, member in ChainMap(*map(vars, own or [value])).items():
                function = getattr(member, "__func__", member)
                callable_or_property = callable(function) or isinstance(function, property)
                if not key.startswith("_") and callable_or_property and not function.__doc__:
                    yield f"{name}.{key}"


def test_every_public_name_has_its_docstring():
    assert list(undocumented({name: getattr(gradstat, name) for name in gradstat.__all__})) == []


def test_a_missing_docstring_would_be_seen():
    import dataclasses

    @dataclasses.dataclass
    class Bare:
        value: int = 0

        @property
        def twice(self) -> int:
            return 2 * self.value

        @classmethod
        def make(cls) -> Bare:
            return cls()

        def _private(self) -> None: ...

    def bare() -> None: ...

    found = set(undocumented({"Bare": Bare, "bare": bare}))
    assert found == {"Bare", "Bare.twice", "Bare.make", "bare"}


NO_TENSORS = {"get_config", "show_config"}


def test_public_functions_say_whether_they_synchronise():
    silent = [
        name
        for name in gradstat.__all__
        if inspect.isfunction(getattr(gradstat, name))
        and not re.search("synchroni", getattr(gradstat, name).__doc__, re.IGNORECASE)
    ]
    assert set(silent) == NO_TENSORS
    assert "synchronise" in gradstat.StatTable.__doc__


# ---- layers -------------------------------------------------------------------------------------

# Lowest first. A module imports from lower layers alone: neither from above nor from beside.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("_native",),
    ("_html", "_json", "_stack", "errors"),
    ("_names", "_units"),
    (
        "_fallback",
        "_accumulation",
        "_capture",
        "_loan",
        "_loss_scale",
        "_optimizer_kind",
        "_readable",
        "_trial",
        "_warnings",
        "columns",
        "render",
    ),
    ("_kernels", "_table_file", "_table_rows"),
    ("_window", "config", "table"),
    ("_alarms", "_batch_sample", "_others", "_probes", "_recorder", "activations", "stats"),
    ("_observations", "_watched", "clipping", "diagnosis"),
    ("_dead_units", "_evidence", "_readings", "_rounds"),
    ("_checkpoint",),
    ("distributed", "guard", "monitor"),
    ("records",),
    ("runlog", "sinks"),
    ("_seam",),
    ("optimizer",),
    ("wrapper",),
    ("_inspections", "lr_range", "noise"),
    ("check",),
    ("_run_view",),
    ("overhead", "plots", "report"),
    ("__init__",),
    ("demo", "show"),
    ("cli",),
    ("__main__",),
    ("integrations",),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
NATIVE_IMPORTERS = {"_kernels"}


def unit_of(parts: Iterable[str]) -> str:
    """Return the part of the package that a dotted path below it belongs to."""
    return next(iter(parts), "__init__")


def imported_units(source: str, parts: tuple[str, ...], known: Iterable[str]) -> set[str]:
    """Return what a module of the package imports of it at run time, anywhere in its text.

    Args:
        source: Text of the module.
        parts: Its place below the package: ``("clipping", "functional")``.
        known: Names directly below the package that are modules.
    """
    tree = ast.parse(source)
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for statement in node.body
        for inner in ast.walk(statement)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            paths = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = ["gradstat", *parts][: 1 + len(parts) - node.level] if node.level else []
            base = [*above, *(node.module.split(".") if node.module else [])]
            paths = [
                [*base, alias.name] if base == ["gradstat"] and alias.name in known else base
                for alias in node.names
            ]
        else:
            continue
        found |= {unit_of(path[1:]) for path in paths if path[0] == "gradstat"}
    return found


def wrong_imports(source: str, parts: tuple[str, ...]) -> list[str]:
    """Return why imports of a module break the order of the layers; nothing where they keep it."""
    own = unit_of(parts)
    if own not in RANK:
        return [f"{own} stands in no layer: give it its place in LAYERS"]
    wrong = []
    for other in sorted(imported_units(source, parts, RANK) - {own}):
        if other == "_native" and own not in NATIVE_IMPORTERS:
            wrong.append(f"{own} imports _native, which only _kernels may")
        elif RANK.get(other, len(LAYERS)) >= RANK[own]:
            wrong.append(f"{own} imports {other}, which does not stand below it")
    return wrong


def parts_of(path: Path) -> tuple[str, ...]:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", modules(), ids=lambda path: ".".join(parts_of(path)) or "__init__")
def test_imports_point_one_way(path):
    assert wrong_imports(path.read_text(), parts_of(path)) == []


WRONG = {
    "upwards": (("stats",), "from gradstat.clipping import clip_grad_norm_"),
    "upwards_by_package": (("errors",), "from gradstat import table"),
    "upwards_in_a_function": (("table",), "def f():\n    from gradstat.stats import grad_stats"),
    "upwards_relative": (("columns",), "from . import table"),
    "upwards_relative_from_a_folder": (("clipping", "agc"), "from ..monitor import Monitor"),
    "sideways": (("clipping", "functional"), "from gradstat.diagnosis import Finding"),
    "the_package_itself": (("_kernels",), "import gradstat"),
    "a_name_of_the_package": (("stats",), "from gradstat import StatTable"),
    "the_compiled_module": (("stats",), "from gradstat import _native"),
    "the_compiled_module_as_a_path": (("clipping", "functional"), "import gradstat._native as n"),
    "an_integration": (("cli",), "from gradstat.integrations import lightning"),
    "an_unknown_module": (("_kernels",), "from gradstat.novelty import x"),
    "from_no_layer": (("novelty",), "import math"),
}


@pytest.mark.parametrize(("parts", "source"), WRONG.values(), ids=WRONG)
def test_a_wrong_import_would_be_seen(parts, source):
    assert wrong_imports(source, parts) != []


RIGHT = {
    "downwards": (("stats",), "from gradstat import _kernels\nfrom gradstat.errors import X"),
    "own_folder": (("clipping",), "from gradstat.clipping.functional import clip_grad_norm_"),
    "own_folder_relative": (("clipping", "agc"), "from .functional import clip_grad_norm_"),
    "the_compiled_module": (("_kernels",), "from gradstat import _native"),
    "for_types_alone": (("render",), "if TYPE_CHECKING:\n    from gradstat.table import StatTable"),
    "other_packages": (("errors",), "import gradstats, torch.nn\nfrom table import x"),
}


@pytest.mark.parametrize(("parts", "source"), RIGHT.values(), ids=RIGHT)
def test_a_right_import_passes(parts, source):
    assert wrong_imports(source, parts) == []


# ---- C++ ----------------------------------------------------------------------------------------


def foreign_includes(text: str, *, with_python: bool) -> list[str]:
    """Return the includes of torch in a file, and of Python where it is to know nothing of it."""
    headers = re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', text, re.MULTILINE)
    banned = ["torch/", "ATen/", "c10/", "caffe2/"]
    if not with_python:
        banned += ["Python.h", "pybind11/"]
    return [header for header in headers if header.startswith(tuple(banned))]


def sources() -> list[Path]:
    found = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cpp", ".cu")]
    return sorted(found)


@pytest.mark.parametrize("path", sources(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_torch_header_and_no_python_in_the_kernels(path):
    with_python = path.name in ("bindings.cpp", "tensor_list.h", "tensor_list.cpp")
    assert foreign_includes(path.read_text(), with_python=with_python) == []


def test_a_foreign_include_would_be_seen():
    text = '#include <torch/extension.h>\n# include "c10/util.h"\n#include <pybind11/pybind11.h>\n'
    assert foreign_includes(text, with_python=True) == ["torch/extension.h", "c10/util.h"]
    assert "pybind11/pybind11.h" in foreign_includes(text, with_python=False)
    assert foreign_includes("#include <cstdint>\n// torch/extension.h", with_python=False) == []


def test_there_are_sources_and_modules_to_look_at():
    assert {"kernels.h", "bindings.cpp", "stub.cpp"} <= {path.name for path in sources()}
    assert {"batch.py", "stats.py", "functional.py"} <= {path.name for path in modules()}


# ---- what `import gradstat` loads ---------------------------------------------------------------

SNAPSHOTS = """
import json, sys
def loaded():
    return sorted({name.partition(".")[0] for name in sys.modules})
import numpy, numpy.typing, torch
seen = [loaded()]
import gradstat
seen.append(loaded())
import gradstat.cli
seen.append(loaded())
import rich.table
seen.append(loaded())
print(json.dumps(seen))
"""


def optional_packages() -> set[str]:
    """Return the extras of pyproject.toml, by the names that they are imported by."""
    extras = [need for need in metadata.requires("gradstat") or [] if "extra ==" in need]
    names = {re.split(r"[\s<>=;\[!~]", need)[0].lower() for need in extras}
    names = {"sklearn" if name == "scikit-learn" else name.replace("-", "_") for name in names}
    return (names | {"matplotlib", "scipy", "tqdm"}) - {"gradstat", "numpy", "torch"}


def test_optional_packages_are_not_imported():
    done = subprocess.run(
        [sys.executable, "-c", SNAPSHOTS], capture_output=True, text=True, check=True
    )
    before, with_gradstat, with_cli, with_rich = map(set, json.loads(done.stdout))
    expected = set(sys.stdlib_module_names) | {"gradstat", "pybind11_builtins"}
    for loaded in (with_gradstat, with_cli):
        assert loaded - before - expected == set()
    assert with_rich - before - expected >= {"rich"}  # it would be seen
    assert {"rich", "pandas", "sklearn", "safetensors"} <= optional_packages()
    assert optional_packages() & with_cli == optional_packages() & before


# ---- types --------------------------------------------------------------------------------------


def run_tool(*arguments: str, cwd: Path, **environment: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_mypy_strict():
    pytest.importorskip("mypy")
    code, output = run_tool("mypy", "--strict", cwd=ROOT)
    assert code == 0, output


def stubtest(folder: Path) -> tuple[int, str]:
    """Compare a copy of the compiled module with its stub, without the package around them."""
    config = folder / "mypy.ini"
    # What torch's types are does not matter here, and reading them takes twenty seconds.
    config.write_text("[mypy]\nfollow_imports = skip\n")
    return run_tool(
        "mypy.stubtest", "gradstat._native", "--mypy-config-file", str(config),
        cwd=folder, PYTHONPATH=str(folder),
    )  # fmt: skip


def copy_of_the_module(folder: Path, stub: str) -> None:
    package = folder / "gradstat"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "py.typed").touch()
    shutil.copy(_native.__file__, package)
    (package / "_native.pyi").write_text(stub)


def test_the_stub_matches_the_compiled_module(tmp_path):
    pytest.importorskip("mypy")
    copy_of_the_module(tmp_path, (PACKAGE / "_native.pyi").read_text())
    code, output = stubtest(tmp_path)
    assert code == 0, output


def test_a_wrong_stub_would_be_seen(tmp_path):
    pytest.importorskip("mypy")
    stub = (PACKAGE / "_native.pyi").read_text()
    changed = stub.replace("def irregular(", "def uneven(").replace(
        "def cuda_is_built", "def built"
    )
    copy_of_the_module(tmp_path, changed)
    code, output = stubtest(tmp_path)
    assert code != 0
    for name in ("TensorList.irregular", "TensorList.uneven", "cuda_is_built", "built"):
        assert f"gradstat._native.{name} is not present" in output
