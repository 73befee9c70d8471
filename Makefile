# make repro: install, and run the pipeline on the embedded default.   make test: install, and run every check.
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
PYTHON ?= python3.11
export PATH := $(BIN):$(PATH)
INSTALLED := $(VENV)/.installed

.PHONY: install repro test lint types unit test-slow ui clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

repro: install
	dvc repro

test: lint types unit

lint: install
	ruff check .
	ruff format --check .

types: install
	mypy

unit: install
	pytest

test-slow: install
	pytest -m slow

ui: install
	mlflow ui --backend-store-uri sqlite:///mlflow.db --host 127.0.0.1 --port 5000

clean:
	rm -rf data/tokens data/responses data/features data/sources.json data/prompts models results checkpoints
