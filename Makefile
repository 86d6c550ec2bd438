# `make demo` and `make test` set up everything: the first target that runs creates the virtual environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The tested PyTorch, CPU or CUDA build. The plugin needs 2.8 or newer.
TORCH ?= torch==2.13.0
XFUSER ?= xfuser==0.7.0

# Two tests at a time, from different files: a launch is shared within a file. The long files come first, and the short
# files of tests/unit last, so that both workers end together. TEST_ARGS="-n 0" runs one test at a time.
PYTEST := python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
SMOKE := "tests/distributed/test_attention.py::test_error_is_within_twice_single_process_sdpa[4-1,2,4]"

# Supported versions of xDiT, each tested in an environment of its own: .venv-xfuser-VERSION.
VERSIONS := 0.5.0 0.6.0 0.7.0
VERSION_TESTS := $(addprefix tests/integration/test_,plugin.py usp.py yunchang_all_to_all.py launchers.py pipelines.py)

.PHONY: demo test test-quick test-slow test-all test-versions test-upstream lint bench gpu kernels-table docs pictures clean
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
	OMP_NUM_THREADS=1 $(BIN)/$(PYTEST) $(TEST_ARGS)

# The unit tests and every layout of Torus Attention on four ranks.
test-quick: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/$(PYTEST) $(SMOKE) tests/unit $(TEST_ARGS)

# The tests marked slow: 55 faults on the emulated cluster, and further launches of programs that `make test` runs once.
test-slow: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/$(PYTEST) -m slow $(TEST_ARGS)

test-all: test test-slow

# Takes 15 minutes and, with the CPU build of PyTorch, 2 GB per version. Reports failures after all versions have run.
test-versions: $(VERSIONS:%=.venv-xfuser-%/.installed)
	@for v in $(VERSIONS); do \
	    echo "== xfuser $$v"; \
	    OMP_NUM_THREADS=1 .venv-xfuser-$$v/bin/$(PYTEST) $(VERSION_TESTS) $(TEST_ARGS) || failed="$$failed $$v"; \
	done; \
	test -z "$$failed" || { echo "failed with xfuser$$failed"; exit 1; }

.venv-xfuser-%/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-xfuser-$*
	.venv-xfuser-$*/bin/python -m pip install --quiet --upgrade "setuptools>=77"
	.venv-xfuser-$*/bin/python -m pip install $(TORCH) xfuser==$*
	.venv-xfuser-$*/bin/python -m pip install --editable ".[dev]"
	touch $@

# Runs the tests of xDiT and yunchang. XDIT= and YUNCHANG= are checkouts of the installed releases (tags 0.7.0 and
# 0.6.4). Takes 20 minutes.
test-upstream: $(STAMP)
	$(BIN)/python -m tests.upstream --xdit $(XDIT) --yunchang $(YUNCHANG) --markdown docs/upstream-tests.md

# Measures the rows of docs/performance.md on an emulated cluster (Linux, iproute2, root or user namespaces).
bench: $(STAMP)
	mkdir -p out
	$(BIN)/sf-xfuser bench --grid examples/grid.toml --against all --json out/grid.json --report out/grid.html --markdown out/grid.md $(BENCH_ARGS)

# Measures one GPU, in at most 8 minutes and without a network: docs/gpu.md. Installs the package into $(PYTHON), which
# has PyTorch.
gpu:
	mkdir -p out
	$(PYTHON) -m sf_xfuser.bench.gpu --out out/gpu.json $(GPU_ARGS)

# Registers, shared memory and spills of each kernel, compiled ahead of time; no GPU is needed.
kernels-table: $(STAMP)
	$(BIN)/python -m sf_xfuser.bench.kernels

# The documentation as a site, in out/site.
docs: $(STAMP)
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	$(BIN)/mkdocs build --strict

# docs/images, from the schedules and from docs/results.
pictures: $(STAMP)
	$(BIN)/python -m sf_xfuser.bench.pictures

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .venv-xfuser-* build dist *.egg-info out
