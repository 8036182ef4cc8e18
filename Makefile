# `make train` and `make test` work on a fresh machine: each installs what it needs into .venv first.

VENV   := .venv
PYTHON := $(VENV)/bin/python
# The first interpreter that answers with a version this project is tested on.
FOUND  := $(shell for p in python3 python3.12 python3.11 python3.13 python3.10; do \
            $$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' 2>/dev/null && { echo $$p; break; }; done)
RUN    := checkpoints/digits
ARGS   ?=

.PHONY: help setup train test lint format bench torture fuzz test-gpu notebooks audit lock clean

help:            ## list the targets
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(VENV)/.installed  ## make .venv with exactly what requirements.lock names

$(VENV)/.installed: requirements.lock
	@test -n "$(FOUND)" || { echo "error: no Python 3.10 to 3.13 found"; echo "fix: install one, then make setup"; exit 2; }
	@if command -v uv >/dev/null 2>&1; then \
	  uv venv -q --allow-existing --python $(FOUND) $(VENV) && \
	  uv pip install -q --python $(PYTHON) --require-hashes -r requirements.lock; \
	else \
	  $(FOUND) -m venv $(VENV) && $(PYTHON) -m pip install -q --require-hashes -r requirements.lock; \
	fi
	@touch $@

train: setup     ## ResNet-50 on scikit-learn's digits, five minutes on two CPU cores
	$(PYTHON) train.py --config recipes/digits.yaml --save-dir $(RUN) --overwrite $(ARGS)

test: setup      ## the fast tests
	$(PYTHON) -m pytest $(ARGS)

lint: setup      ## style, and that nothing unpickles or shells out
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: setup
	$(VENV)/bin/ruff check --fix -q . ; $(VENV)/bin/ruff format -q .

bench: setup     ## loader and step, side by side with public peers: make bench DATA=data/imagenet
	$(PYTHON) -m benchmarks.loader --data-dir $(or $(DATA),data/imagenet) --json benchmarks/loader.json
	$(PYTHON) -m benchmarks.step --json benchmarks/step.json

TORTURED := checkpoint schemas rundir loop signals resume wrong_input distributed torture security

torture: setup   ## hundreds of killed, damaged and resumed runs; about half an hour
	$(PYTHON) -m pytest -m "not gpu" $(TORTURED:%=tests/test_%.py) $(ARGS)

fuzz: setup      ## random command lines, damaged files; FUZZ_SEED=7 for others
	$(PYTHON) -m pytest -m fuzz tests/test_fuzz.py $(ARGS)

test-gpu: setup  ## what only a GPU can show
	$(PYTHON) -m pytest -m gpu $(ARGS)

notebooks: setup ## run the ablation notebooks again, in place
	$(PYTHON) -m jupyter execute --inplace ablation_runs/*.ipynb

audit: setup     ## known vulnerabilities among the locked packages
	$(VENV)/bin/pip-audit --strict --require-hashes --disable-pip -r requirements.lock

lock:            ## pin anew what requirements.txt and pyproject.toml allow (needs uv)
	uv pip compile requirements.txt --group dev --universal --python-version 3.10 --generate-hashes \
	  --no-emit-index-url --no-header -o requirements.lock

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
