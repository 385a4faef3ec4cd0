# Two commands on a fresh machine: `make demo` (nothing -> a served, evaluated policy) and `make test`.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

# The demonstration; override on the command line: make demo SEED=1
SEED          ?= 0
EPISODES      ?= 40
MINUTES       ?= 5
EVAL_EPISODES ?= 50
OUTPUT        ?= runs/demo

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint stubs clean

help: ## This list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

setup: $(VENV)/.ready ## Make .venv with everything that the demo and the tests need

# An editable install, so that the tests see the working tree; made again when pyproject.toml changes. Python compiles
# what is imported: to compile all that is installed took a minute more.
$(VENV)/.ready: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14) and "training needs Python 3.11 to 3.13 (numpy < 2.3 has no wheel for newer ones): make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile --editable '.[dev]'
	touch $@

demo: ## Collect, train, export, serve, evaluate, report: SEED, EPISODES, MINUTES, EVAL_EPISODES, OUTPUT=runs/demo
	@started=$$(date +%s) && $(MAKE) --no-print-directory setup && \
	$(BIN)/python -m training.demo --output $(OUTPUT) --seed $(SEED) --episodes $(EPISODES) --minutes $(MINUTES) \
		--eval-episodes $(EVAL_EPISODES) --setup-seconds $$(( $$(date +%s) - started ))

test: setup lint ## Lint, types, import rules and the whole suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --numprocesses 2 --dist loadfile

lint: setup ## ruff, mypy, the import rules, the stubs and the proto
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m protos.generate --check
	$(BIN)/buf lint protos

stubs: setup ## Generate the gRPC stubs again after a change of policy.proto
	$(BIN)/python -m protos.generate

clean: ## Remove the virtual environment and caches; runs/ stays
	rm -rf $(VENV) build .pytest_cache .ruff_cache .mypy_cache .hypothesis .import_linter_cache *.egg-info
