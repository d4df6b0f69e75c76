# make train   set up .venv and train the resnet recipe
# make test    set up .venv and run everything that CI runs
PYTHON ?= python3
BIN := .venv/bin

.PHONY: train test test-gpu lint bench clean

train: .venv/installed
	$(BIN)/python -m pipeline.train +recipe=resnet $(ARGS)

test: lint
	$(BIN)/python -m pytest $(ARGS)

test-gpu: .venv/installed-dev
	$(BIN)/python -m pytest -m gpu $(ARGS)

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: .venv/installed-dev
	$(BIN)/python -m benchmarks.overhead
	$(BIN)/python -m benchmarks.overlap
	$(BIN)/python -m benchmarks.gil_truth

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml | .venv/bin/python
	@echo "Installing torch and the rest into .venv: a minute or two, nothing is shown meanwhile."
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

.venv/installed-dev: pyproject.toml | .venv/bin/python
	@echo "Installing torch and the tools into .venv: a minute or two, nothing is shown meanwhile."
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@ .venv/installed

clean:
	rm -rf .venv build dist
