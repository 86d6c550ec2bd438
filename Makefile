# Two commands do everything: `make demo` and `make test`. Each makes the virtual environment first; so does `make bench`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The tested PyTorch; the plugin itself needs 2.8 or newer. Any build will do, CPU or CUDA.
TORCH ?= torch==2.13.0
XFUSER ?= xfuser==0.7.0

.PHONY: demo test lint bench kernels-table clean
.DEFAULT_GOAL := test

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "setuptools>=77"
	$(BIN)/python -m pip install $(TORCH) $(XFUSER)
	$(BIN)/python -m pip install --editable ".[dev]"
	touch $@

demo: $(STAMP)
	$(BIN)/python examples/demo.py $(DEMO_ARGS)

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(TEST_ARGS)

# The rows behind docs/performance.md, on an emulated cluster (Linux, iproute2, root or user namespaces).
bench: $(STAMP)
	mkdir -p out
	$(BIN)/sf-xfuser bench --grid examples/grid.toml --json out/grid.json --report out/grid.html --markdown out/grid.md $(BENCH_ARGS)

# Registers, shared memory and spills of each kernel, compiled ahead of time; no GPU is needed.
kernels-table: $(STAMP)
	$(BIN)/python -m sf_xfuser.bench.kernels

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info out
