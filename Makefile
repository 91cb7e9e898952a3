# `make demo` and `make test` each set up everything they need, in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
TORCH := $(shell grep '^torch==' constraints.txt)

.PHONY: demo test test-long lint benchmark clean

demo: $(STAMP)
	$(BIN)/python -m surgery run recipes/adder.yaml --overwrite

test: $(STAMP) lint
	$(BIN)/python -m pytest -m "not long" --numprocesses auto --dist loadfile

test-long: $(STAMP)
	$(BIN)/python -m pytest -m long

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

benchmark: $(STAMP)
	$(BIN)/python benchmarks/dedup_weights.py

# torch first and alone: a later requirement would otherwise bring a build with gigabytes of CUDA.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --quiet --constraint constraints.txt --editable '.[cpu,transformers,dev]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) out
