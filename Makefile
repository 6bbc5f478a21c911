# The commands of this project; continuous integration runs the same ones. `make` lists them.
#
# Packages go into the active virtual environment, or else into .venv, which is made where missing.
# Options: PYTHON=python3.12 (makes .venv), CUDAARCHS=86, GRADSTAT_CUDA=ON|OFF|AUTO.

SHELL  := /bin/bash
PYTHON ?= python3
VENV   := $(or $(VIRTUAL_ENV),.venv)
DATE   := $(shell date +%Y-%m-%d)
export PATH := $(abspath $(VENV))/bin:$(PATH)

# Development builds hold code for one kind of GPU: this machine's, or else sm_90.
GRADSTAT_CUDA ?= AUTO
CUDAARCHS     ?= $(or $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null \
                   | sed -n 's/^\([0-9]*\)\.\([0-9]*\)$$/\1\2/p;q'),90)
export GRADSTAT_CUDA CUDAARCHS

APT = apt-get install -y --no-install-recommends chromium fonts-dejavu-core

CPP_FILES = $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu')

.PHONY: help demo test browser lint format bench diagnosis-bench docs sanitize gpu-check gpu-build gpu-test \
        gpu-sanitize gpu-bench module clean
.NOTPARALLEL:

help:  ## list the commands
	@sed -n 's/^\([a-z-]*\):.*  ## /\1\t/p' Makefile | expand -t 12

demo: $(VENV)/.gradstat-demo module  ## train a small network and watch its gradients
	python -m gradstat demo

test: $(VENV)/.gradstat-dev module  ## run the tests
	pytest

browser: $(VENV)/.gradstat-dev  ## install the browser that the report's tests open
	command -v chromium chromium-browser google-chrome || { [ "$$(id -u)" = 0 ] && \
	  { $(APT) || { apt-get update && $(APT); }; }; } || python -m playwright install chromium

lint: $(VENV)/.gradstat-dev  ## check style and types
	ruff check .
	ruff format --check .
	mypy
	clang-format --dry-run -Werror $(CPP_FILES)

format: $(VENV)/.gradstat-dev  ## rewrite the code in the project's style
	ruff check --fix-only .
	ruff format .
	clang-format -i $(CPP_FILES)

bench: $(VENV)/.gradstat-dev module  ## time the CPU kernels and refresh bench/README.md
	mkdir -p bench/results
	pytest bench -m "not needs_cuda" --benchmark-json=bench/results/cpu-$(DATE).json
	python bench/report.py

diagnosis-bench: $(VENV)/.gradstat-dev module  ## count how often the diagnosis is right (10 min)
	PYTHONPATH=tests python bench/diagnosis_zoo.py

docs: $(VENV)/.gradstat-docs module  ## build the documentation's site into build/site
	NO_MKDOCS_2_WARNING=1 python -m mkdocs build

# ---- installing ----------------------------------------------------------------------------------

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# pip only registers the source tree (it has no target to build and nothing to install): each of
# its builds starts from nothing, while `module` keeps its build folder, and an edit costs one file.
$(VENV)/.gradstat-%: setup.py pyproject.toml constraints-dev.txt | $(VENV)/bin/python
	@python -m pip --version >/dev/null 2>&1 || python -m ensurepip
	python -m pip install -c constraints-dev.txt \
	  "scikit-build-core[setuptools]" setuptools pybind11 cmake ninja
	SKBUILD_BUILD_TARGETS=help SKBUILD_INSTALL_COMPONENTS=none GRADSTAT_CUDA=OFF \
	  python -m pip install -c constraints-dev.txt --no-build-isolation -e ".[$*]"
	touch $@

DEV_BUILD = build/dev-$(shell $(VENV)/bin/python -c "import sys; print(sys.implementation.cache_tag)")
module:
	cmake -S . -B $(DEV_BUILD) -G Ninja -Wno-unused-cli \
	  -DPython_EXECUTABLE="$$(command -v python)" \
	  -Dpybind11_DIR="$$(python -m pybind11 --cmakedir)" \
	  -DGRADSTAT_CUDA=$(GRADSTAT_CUDA) -DCMAKE_CUDA_ARCHITECTURES=$(CUDAARCHS)
	cmake --build $(DEV_BUILD)
	cmake --install $(DEV_BUILD) --prefix .

# A separate copy of the package under build/, made as `pip install .` makes it on any machine.
define install_copy
rm -rf build/$(1) build/lib*
python3 -m pip install --no-build-isolation --no-deps --target build/$(1) .
endef

# ---- sanitizers ----------------------------------------------------------------------------------

# libstdc++ is loaded first too, or AddressSanitizer does not see the exceptions it throws.
sanitize: export GRADSTAT_CUDA := OFF
sanitize: export SKBUILD_CMAKE_DEFINE := GRADSTAT_SANITIZE=ON
sanitize: export SKBUILD_INSTALL_STRIP := false
sanitize: $(VENV)/.gradstat-dev  ## run the kernel tests under AddressSanitizer and UBSan
	$(call install_copy,sanitize)
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	PYTHONPATH=$(CURDIR)/build/sanitize PYTHONSAFEPATH=1 \
	  pytest --capture=sys tests/test_kernels*.py

# ---- a machine with a GPU, perhaps offline: needs what the steps use in the active Python ---------

COMPUTE_SANITIZER = $(firstword $(shell command -v compute-sanitizer) \
                      $(wildcard /usr/local/cuda/bin/compute-sanitizer))
gpu-test gpu-sanitize gpu-bench: export FAIL_WITHOUT_CUDA := 1
gpu-test gpu-sanitize gpu-bench: export PYTHONPATH := $(CURDIR)/build/gpu
gpu-test gpu-sanitize gpu-bench: export PYTHONSAFEPATH := 1

gpu-check: gpu-build  ## build, test, sanitize and time the CUDA kernels, without a network
	@failed=; \
	for step in gpu-test gpu-sanitize gpu-bench; do \
	  timeout 150 $(MAKE) --no-print-directory $$step || failed+=" $$step"; \
	done; \
	if [ -n "$$failed" ]; then echo "gpu-check: failed:$$failed"; exit 1; fi; \
	echo "gpu-check: passed"

gpu-build: export GRADSTAT_CUDA := ON
gpu-build:
	$(call install_copy,gpu)

gpu-test:
	python3 -m pytest tests -m needs_cuda

gpu-sanitize:
ifeq ($(COMPUTE_SANITIZER),)
	@echo "gpu-sanitize: skipped, compute-sanitizer was not found"
else
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(COMPUTE_SANITIZER) --error-exitcode 1 \
	  python3 tests/cuda_sanitize_smoke.py
endif

gpu-bench:
	mkdir -p bench/results
	python3 -m pytest bench -m needs_cuda --benchmark-json=bench/results/gpu-$(DATE).json

clean:  ## remove what was built (not .venv)
	rm -rf build dist *.egg-info gradstat/_native*.so
	rm -rf .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
