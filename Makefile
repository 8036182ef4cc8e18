# Every target that needs packages installs them into .venv first, so `make train` works on a fresh machine.

VENV   := .venv
PYTHON := $(VENV)/bin/python
# The first interpreter of a version that this project is tested with.
FOUND  := $(shell for p in python3 python3.12 python3.11 python3.13 python3.10; do \
            $$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' 2>/dev/null && { echo $$p; break; }; done)
RUN    := checkpoints/digits
DATA   ?= data/imagenet
RESULTS ?= benchmark-results
ARGS   ?=
PARALLEL := -n auto --maxprocesses 8 --dist worksteal

.PHONY: help setup train test lint format bench torture slow fuzz test-gpu notebooks audit lock clean

help:            ## list the targets
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(VENV)/.installed  ## install exactly what requirements.lock names into .venv

$(VENV)/.installed: requirements.lock
	@test -n "$(FOUND)" || { echo "error: no Python 3.10 to 3.13 found"; echo "fix: install one, then make setup"; exit 2; }
	@if command -v uv >/dev/null 2>&1; then \
	  uv venv -q --allow-existing --python $(FOUND) $(VENV) && \
	  uv pip install -q --python $(PYTHON) --require-hashes -r requirements.lock; \
	else \
	  $(FOUND) -m venv $(VENV) && $(PYTHON) -m pip install -q --require-hashes -r requirements.lock; \
	fi
	@touch $@

train: setup     ## train a ResNet-50 on scikit-learn's digits: three minutes on a CPU
	$(PYTHON) train.py --config recipes/digits.yaml --save-dir $(RUN) --overwrite $(ARGS)

test: setup      ## run the fast tests
	$(PYTHON) -m pytest $(PARALLEL) $(ARGS)

lint: setup      ## check style; nothing may unpickle or run a shell
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: setup    ## fix style and formatting
	$(VENV)/bin/ruff check --fix -q . ; $(VENV)/bin/ruff format -q .

# benchmarks/README.md explains these, and the two that measure reliability: goodput and bitflips.
bench: setup     ## measure loader, storage and step: make bench DATA=data/imagenet
	$(PYTHON) -m benchmarks.loader --data-dir $(DATA) --out $(RESULTS)
	$(PYTHON) -m benchmarks.storage --data-dir $(DATA) --out $(RESULTS)
	$(PYTHON) -m benchmarks.step --out $(RESULTS)

TORTURED := checkpoint schemas rundir loop signals resume wrong_input distributed torture security \
            pack_dataset benchmarks_goodput

torture: setup   ## kill, damage and resume hundreds of runs: eleven minutes
	$(PYTHON) -m pytest -m "not gpu" $(TORTURED:%=tests/test_%.py) $(ARGS)

slow: setup      ## run the slow tests, left out by make test: ten minutes on two cores
	$(PYTHON) -m pytest -m slow $(PARALLEL) $(ARGS)

fuzz: setup      ## random command lines and damaged files (FUZZ_SEED=7: others)
	$(PYTHON) -m pytest -m fuzz tests/test_fuzz.py $(ARGS)

test-gpu: setup  ## run the tests that need a GPU
	$(PYTHON) -m pytest -m gpu $(ARGS)

notebooks: setup ## run the ablation notebooks, in place
	$(PYTHON) -m jupyter execute --inplace ablation_runs/*.ipynb

audit: setup     ## look for known vulnerabilities in the locked packages
	$(VENV)/bin/pip-audit --strict --require-hashes --disable-pip -r requirements.lock

lock:            ## write requirements.lock from the direct requirements (needs uv)
	uv pip compile requirements.txt --group dev --universal --python-version 3.10 --generate-hashes \
	  --no-emit-index-url --no-header -o requirements.lock

clean:           ## delete .venv and caches
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
