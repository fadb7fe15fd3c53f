# deepfid: `make help` lists what there is. Every target sets up what it needs: Python >= 3.11, git and make suffice.

# Which faces `make demo` uses: empty (London's photographs, in the package), synthetic, portraits or congress (see the README)
DATA ?=
# More options for `deepfid demo`, for instance DEMO_FLAGS="--help"
DEMO_FLAGS ?=
# A Python >= 3.11 to build the environment with; empty = look for one
PYTHON ?=
# How many processes run pytest: one more than two cores, since some tests wait for a command, a page or a signal
PY_WORKERS ?= 3
# How many notebooks are tested at a time, and which (a notebook or a folder)
NB_WORKERS ?= 2
NB ?= nbs
# More options for pytest, for instance PYTEST_FLAGS="-k forge"
PYTEST_FLAGS ?= -q
# More options for JupyterLab, for instance LAB_FLAGS="--no-browser --port 9999"
LAB_FLAGS ?=

# bash for `pipefail`; nothing else needs it
SHELL := bash
VENV := .venv
BIN := $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
# The environment is up to date if this file exists: its name is a checksum of all that decides what is installed, and where.
READY := $(VENV)/.ready-$(firstword $(shell (cat settings.ini setup.py constraints.txt; pwd) | cksum))
# One thread to each process, or two workers fight over two cores; `agg` draws without a screen; what a step of training has freed
# is kept for the next one (glibc gives it back and asks for it anew: a twentieth of the time).
NBENV := PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1 MPLBACKEND=agg MALLOC_MMAP_THRESHOLD_=1000000000 MALLOC_TRIM_THRESHOLD_=4000000000

.PHONY: help setup demo bundle check test test-notebooks test-python lab export docs site run clean
.DEFAULT_GOAL := help
.NOTPARALLEL:

help: ## This list
	@echo "make TARGET, where TARGET is one of"
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  \1|\2/p' Makefile | awk -F'|' '{printf "%-18s%s\n", $$1, $$2}'

demo: $(READY) ## Forge photographs, fine-tune, test, report to out/demo (DATA=synthetic, portraits or congress: on others)
	@$(BIN)/deepfid demo $(if $(DATA),--data $(DATA)) $(DEMO_FLAGS)

check: $(READY) ## Lint (ruff), types (pyright), notebooks in order: seconds, before the tests
	@$(BIN)/ruff check .
	@$(BIN)/pyright
	@$(BIN)/python .ci/notebooks.py check

test: check test-notebooks test-python ## Check, run every notebook (cells flagged slow or cuda left out), then pytest

test-notebooks: $(READY) ## Only the notebooks (NB=nbs/02_forge.ipynb: one of them)
	@test -e "$(NB)" || { echo "NB=$(NB): no such notebook or folder" >&2; exit 1; }
	@$(NBENV) $(BIN)/python .ci/notebooks.py test $(NB) --workers $(NB_WORKERS)

test-python: $(READY) ## Only pytest (PYTEST_FLAGS="-k house": some of it)
	@$(NBENV) $(BIN)/python -m pytest tests -n $(PY_WORKERS) --dist loadfile --no-loadscope-reorder --durations 10 $(PYTEST_FLAGS)

bundle: $(READY) ## Train the bundled detectors from nothing, and put them into the package (hours on a CPU)
	@$(BIN)/python -m deepfid.experiments.bundle --install

lab: $(READY) ## JupyterLab on the notebooks
	@$(BIN)/python -m jupyterlab $(LAB_FLAGS) nbs

export: $(READY) ## Write the modules from the notebooks
	@$(BIN)/nbdev-export

run: $(READY) ## Execute notebooks and keep their outputs, cleaned (NB=nbs/02_forge.ipynb)
	@$(BIN)/python .ci/notebooks.py run $(NB)

docs: $(READY) ## After an edit: write the reading path, clean the notebooks, export the modules, render README.md
	@$(BIN)/python .ci/notebooks.py path
	@$(BIN)/python .ci/notebooks.py clean
	@$(BIN)/nbdev-export
	@$(BIN)/python .ci/notebooks.py readme

site: $(READY) ## Build the documentation site into out/site (offline; warnings are errors)
	@$(BIN)/python .ci/docs_site.py --check

setup: $(READY) ## Only the environment, in .venv
	@:

clean: ## Remove the environment and everything that was made
	rm -rf $(VENV) out build dist *.egg-info

$(READY):
	@set -e -o pipefail; python="$(PYTHON)"; \
	fits='import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))'; \
	for name in python3 python3.13 python3.12 python3.11 python3.14 python; do \
	    if [ -z "$$python" ] && "$$name" -c "$$fits" >/dev/null 2>&1; then python=$$name; fi; \
	done; \
	if [ -z "$$python" ]; then \
	    echo "deepfid needs Python 3.11 or later with its venv module, and none is on the PATH." >&2; \
	    echo "Install one, or say where it is: make PYTHON=/path/to/python3 ..." >&2; exit 1; \
	elif ! "$$python" -c "$$fits" >/dev/null 2>&1; then \
	    echo "PYTHON=$$python cannot be used: deepfid needs Python 3.11 or later with its venv module." >&2; exit 1; \
	fi; \
	if ! $(BIN)/python -c "import pip; $$fits" >/dev/null 2>&1; then \
	    echo "Making $(VENV) with $$("$$python" --version)"; "$$python" -m venv --clear $(VENV); \
	fi; \
	rm -f $(VENV)/.ready-*; \
	echo "Installing what settings.ini asks for, as pinned in constraints.txt (once; some minutes, several gigabytes)"; \
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -c constraints.txt -e '.[dev]' | \
	    awk '/^ *(Downloading|Using cached) .*(MB|GB)/ {print "  " $$2, $$3, $$4; fflush()} \
	         /^Installing collected/ {print "Unpacking"; fflush()}'; \
	touch $@; echo "Ready"
