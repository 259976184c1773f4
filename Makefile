# ALTO. `make` lists what there is.
#
# Everything runs in .venv, which `make install` builds from pyproject.toml and the exact versions in constraints.txt.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
# Extra CMake settings of the extension, such as -DALTO_CUDA=ON.
CMAKE_ARGS ?=
# pytest's own arguments, such as TESTS=tests/placement or TESTS="-k fencing".
TESTS  ?=
# A benchmark (the name of a file in benchmarks/) and its arguments.
NAME   ?=
ARGS   ?=

SOURCES_OF_INSTALL := pyproject.toml constraints.txt CMakeLists.txt \
	$(shell find ext -name '*.cpp' -o -name '*.h' -o -name '*.hpp' -o -name '*.cu' -o -name '*.cuh' -o -name CMakeLists.txt)
PYTHON_FOLDERS := services clients/python/alto_client clients/python/alto_cli ext tests benchmarks proto
export PIP_DISABLE_PIP_VERSION_CHECK = 1
export CMAKE_ARGS

.PHONY: help install proto format check test cuda bench quickstart clean

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

install: $(VENV)/.installed  ## Build .venv: dependencies and the extension

$(VENV)/.installed: $(SOURCES_OF_INSTALL)
	@echo "==> Creating $(VENV) and installing (a few minutes, once)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "==> [1/3] PyTorch"
	@$(BIN)/pip install --quiet --constraint constraints.txt torch
	@echo "==> [2/3] Build tools"
	@$(BIN)/pip install --quiet --constraint constraints.txt setuptools wheel scikit-build-core pybind11 cmake ninja
	@echo "==> [3/3] Dependencies, ALTO and its compiled extension"
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation \
		--editable '.[server,training,dev]'
	@touch $@

proto: install  ## Compile proto/ into clients/python
	@$(BIN)/python proto/generate.py

format: install  ## Put the sources into the house's format
	@$(BIN)/ruff check --fix --quiet $(PYTHON_FOLDERS) || true
	@$(BIN)/ruff format --quiet $(PYTHON_FOLDERS)
	@find ext -name '*.cpp' -o -name '*.h' -o -name '*.hpp' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format -i

check: install  ## Lint, types, walls between rooms, the contract
	@echo "==> ruff" && $(BIN)/ruff check $(PYTHON_FOLDERS) && $(BIN)/ruff format --check $(PYTHON_FOLDERS)
	@echo "==> mypy" && $(BIN)/mypy
	@echo "==> import-linter" && $(BIN)/lint-imports --no-cache
	@echo "==> contract" && $(BIN)/python proto/generate.py --check
	@mkdir -p build && $(BIN)/python proto/generate.py --image build/alto.binpb
	@$(BIN)/buf lint build/alto.binpb --config proto/buf.yaml --path alto/v1
	@echo "==> clang-format" && find ext -name '*.cpp' -o -name '*.h' -o -name '*.hpp' -o -name '*.cu' -o -name '*.cuh' \
		| xargs $(BIN)/clang-format --dry-run --Werror
	@echo "all clean"

test: install  ## All tests
	@$(BIN)/pytest -n 2 $(TESTS)

cuda: install  ## Compile the CUDA kernels, where there is nvcc, and test their schedules and layouts; needs no GPU
	@if ! command -v nvcc > /dev/null; then echo "no nvcc: the CUDA kernels are not compiled"; exit 0; fi; set -e; \
	$(BIN)/pip install --quiet --no-deps nvidia-cutlass==4.2.0.0; \
	export PATH="$(CURDIR)/$(BIN):$$PATH"; \
	echo "==> Compiling into build/cuda (a few minutes)"; \
	cmake -G Ninja -S . -B build/cuda -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE="$(CURDIR)/$(BIN)/python" \
		-Dpybind11_DIR="$$(python -m pybind11 --cmakedir)" -DALTO_CUDA=ON $(CMAKE_ARGS) > build/cuda.log 2>&1 \
		|| { cat build/cuda.log; exit 1; }; \
	cmake --build build/cuda --target alto_kernels_module > build/cuda.log 2>&1 || { cat build/cuda.log; exit 1; }; \
	PYTHONPATH=build/cuda/ext/alto_kernels python -c "import sys, pytest, _kernels; \
		print('compiled for', _kernels.cuda_architectures); \
		sys.modules['alto_kernels._kernels'] = _kernels; \
		sys.exit(pytest.main(['-q', 'tests/kernels/test_schedule.py', 'tests/kernels/test_layer_shape.py']))"

bench: install  ## Run benchmarks/NAME.py with ARGS; its last line is one JSON object
	@test -n "$(NAME)" || { echo "which one? make bench NAME=parity; there are:"; ls benchmarks/*.py; exit 2; }
	@$(BIN)/python benchmarks/$(NAME).py $(ARGS)

quickstart: install  ## The main job: a search over a real model, its best adapter in quickstart-output/
	@PATH="$(CURDIR)/$(BIN):$$PATH" examples/quickstart.sh

clean:  ## Remove what was built
	@rm -rf $(VENV) build dist quickstart-output
