# `make demo` and `make test` are the two commands; both make .venv and install what is missing first.
PYTHON ?= python3
# Extra pip arguments, e.g. PIP_ARGS="--index-url https://download.pytorch.org/whl/cpu --extra-index-url https://pypi.org/simple"
PIP_ARGS ?=
BIN := .venv/bin

.PHONY: demo test test-slow docs bench lint clean

demo: .venv/ready
	$(BIN)/shiq-lab selftest

test: .venv/ready
	$(BIN)/python -m pytest -n auto -m "not slow"

test-slow: .venv/ready-slow
	$(BIN)/python -m pytest -n auto -m slow

# The site: docs/_build/html, from the docstrings, the notebooks' outputs, README and docs/.
docs: .venv/ready-docs
	$(BIN)/python docs/make_site.py

bench: .venv/ready
	$(BIN)/python -m pip install -q -c constraints.txt $(PIP_ARGS) -e ".[bench]"
	$(BIN)/shiq-lab bench

lint: .venv/ready
	$(BIN)/python -m pip install -q -c constraints.txt $(PIP_ARGS) -e ".[dev]"
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

# torch by name and first: constraints.txt pins a release for which pip takes a CPU wheel where the index offers one.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt $(PIP_ARGS) torch
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt $(PIP_ARGS) -e ".[test]"
	@touch $@

# The slow tests run whole Hugging Face trainers, a real model and the official benchmark, and build the site.
.venv/ready-slow: .venv/ready requirements-assets.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt $(PIP_ARGS) -e ".[test,hf,docs]"
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps $(PIP_ARGS) -r requirements-assets.txt
	@touch $@

.venv/ready-docs: .venv/ready
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt $(PIP_ARGS) -e ".[docs]"
	@touch $@

clean:
	rm -rf .venv build dist docs/_build *.egg-info
