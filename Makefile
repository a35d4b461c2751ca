# avlab. `make` lists what there is.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt
PYTHON ?= $(shell for p in python3.11 python3 python; do $$p -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
PACKAGING := settings.ini setup.py pyproject.toml constraints.txt
WORKERS ?= 2

# Small models on few cores are fastest with one thread each, and tests fetch nothing.
test soak notebooks: export OMP_NUM_THREADS = 1
test soak notebooks: export OPENBLAS_NUM_THREADS = 1
test soak: export AVLAB_DOWNLOADS = never
export MPLBACKEND ?= agg
export CLIP ?=

##@ First

.PHONY: tour
tour: $(VENV)/.base ## Portraits speak and a clip is understood: runs/tour/index.html (CLIP=my.mp4 takes your clip)
	@clip=(); if [ -n "$$CLIP" ]; then case "$$CLIP" in /*) ;; *) CLIP="$$PWD/$$CLIP";; esac; $(VENV)/bin/avlab probe "$$CLIP" >/dev/null; clip=(-p "clip=$$CLIP"); fi; \
	$(VENV)/bin/avlab run nbs/runs/tour.ipynb -o runs/tour -p size=512 $${clip[@]+"$${clip[@]}"}
	@echo "The tour is at file://$$PWD/runs/tour/index.html"

.PHONY: test
test: $(VENV)/.dev ## Everything that must pass
	@echo "exported code, cleaned notebooks and the README are up to date"
	@$(PY) -m avlab.app.notebooks check
	@echo "every default cell of every notebook"
	@$(VENV)/bin/nbdev-test --n-workers $(WORKERS)
	@echo "the site builds"
	@$(PY) -m avlab.app.docs --quiet
	@if [ -n "$${CI:-}" ]; then $(PY) -m avlab.app.notebooks committed; fi
	@$(PY) -m pytest -n $(WORKERS) --dist loadfile tests

##@ Working here

.PHONY: lab
lab: $(VENV)/.dev ## JupyterLab on the notebooks
	@$(VENV)/bin/jupyter lab nbs

.PHONY: notebooks
notebooks: $(VENV)/.dev ## Run notebooks again and store what they show (NB="03_faces app/00_cli" for some)
	@$(PY) -m avlab.app.notebooks store $(NB)

.PHONY: docs
docs: $(VENV)/.dev ## The site in _docs/ and README.md, both from the notebooks
	@$(PY) -m avlab.app.docs

.PHONY: soak
soak: $(VENV)/.dev ## The long checks; their counts go to tests/soak/results/
	@for f in tests/soak/[a-z]*.py; do echo "$$f"; $(PY) "$$f"; done

.PHONY: bench
bench: $(VENV)/.dev ## How fast it is here: swap, voice, serve, sync; pages in runs/bench_*
	@for b in swap voice serve sync; do $(VENV)/bin/avlab bench $$b; done

.PHONY: gpu
gpu: $(VENV)/.base ## What a GPU machine has, what is missing and how to get it
	@$(VENV)/bin/avlab doctor --gpu

.PHONY: clean
clean: ## Remove what was built (not .venv, not results)
	@rm -rf _docs _proc build dist .pytest_cache .cache
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

.PHONY: help
help: ## This list
	@awk 'BEGIN {FS = ":.*## "} /^##@/ {printf "\n%s\n", substr($$0, 5)} /^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2} END {print ""}' $(MAKEFILE_LIST)

# What is installed is remembered by stamps, so the second run starts at once.
$(PY):
	@if [ -z "$(PYTHON)" ]; then echo "avlab needs Python 3.11 and none was found. Install it, or name it: make tour PYTHON=/path/to/python3.11" >&2; exit 1; fi
	@echo "making $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv $(VENV) || { echo "Python could not make a virtual environment (Debian: install python3.11-venv)." >&2; rm -rf $(VENV); exit 1; }

$(VENV)/.base: $(PACKAGING) tools/system.py | $(PY)
	@$(PY) tools/system.py
	@echo "installing avlab: a few minutes, and only now"
	@$(PIP) 'setuptools<81' wheel
	@$(PIP) torch
	@$(PIP) --no-build-isolation -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.base
	@$(PY) tools/system.py browser
	@echo "installing what developing and testing need"
	@$(PIP) --no-build-isolation -e '.[dev,docs]'
	@touch $@
