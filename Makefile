# Two commands for a fresh machine: `make demo` sets up and runs the main job, `make test` sets up and tests.
PYTHON ?= python3
# Pinned because newer wheels bring several GB of CUDA libraries; `make demo TORCH=torch` takes the newest.
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test docs gpu gpu-dry-run lint clean

demo: $(VENV)/installed
	$(BIN)/mask2former-hf demo --output demo_output

test: $(VENV)/installed-for-tests
	$(BIN)/python -m pytest -n 2 --dist worksteal

# The site, in docs/_build; a link that leads nowhere, or a docstring that cannot be read, is an error.
docs: $(VENV)/installed-for-docs
	$(BIN)/python -m sphinx -W --keep-going -q -c docs/site . docs/_build

# Needs a GPU, no network, and 8 minutes; PYTHON is one in which torch finds the GPU.
gpu:
	PYTHON=$(PYTHON) benchmarks/gpu.sh

# The same lines on a CPU, with small numbers.
gpu-dry-run: $(VENV)/installed-for-tests
	PYTHON=$(BIN)/python benchmarks/gpu.sh --device cpu --quick

lint: $(VENV)/installed-for-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(VENV)/installed: setup.cfg setup.py pyproject.toml src/mask2former_hf/kernels/msda_cpu.cpp
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --disable-pip-version-check -e .
	touch $@

$(VENV)/installed-for-tests: $(VENV)/installed
	$(BIN)/python -m pip install --disable-pip-version-check -e .[test]
	touch $@

$(VENV)/installed-for-docs: $(VENV)/installed
	$(BIN)/python -m pip install --disable-pip-version-check -e .[docs]
	touch $@

clean:
	rm -rf $(VENV) build dist src/*.egg-info demo_output docs/_build
