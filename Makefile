# Two commands do everything on a fresh machine: `make demo` and `make test`. Both make .venv when it is missing or out of date.

PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11,\
            $(shell $(p) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && command -v $(p))))
BIN := .venv/bin
STAMP := .venv/installed
# The compiled operators look for ninja on the PATH.
export PATH := $(CURDIR)/$(BIN):$(PATH)

# Every worker keeps one core busy; tests of one file stay together, for they share what they made.
PYTEST := $(BIN)/pytest -n auto --dist loadfile

.PHONY: docs help demo test test-slow test-browser lab bench lint install clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: install  ## train and evaluate a small SOLQ on drawn shapes, on the CPU
	$(BIN)/solq-lab run notebooks/train.ipynb experiments/shapes.yaml

test: install  ## the quick tests
	$(PYTEST)

test-slow: install  ## the long ones
	$(PYTEST) -m slow

test-browser: install  ## drive the explorers in JupyterLab with Chromium
	$(BIN)/pytest tests -m browser

lab: install  ## open JupyterLab at the repository, with the tour
	$(BIN)/jupyter lab --ServerApp.root_dir=. notebooks/tour.ipynb

bench: install  ## side-by-side speed ratios
	$(BIN)/solq-lab bench --json bench.json

lint: install  ## style, types, import contracts, clean notebooks
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/nbstripout --verify notebooks/*.ipynb

docs: install  ## the documentation as a site, with every notebook executed: site/index.html
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	SOLQ_DOCS_EXECUTE=$${SOLQ_DOCS_EXECUTE:-1} $(BIN)/mkdocs build --strict --quiet

install: $(STAMP)  ## .venv with everything, in the pinned versions; TORCH_INDEX=URL takes torch from another index

$(STAMP): pyproject.toml constraints.txt
	@if [ -z "$(PYTHON)" ]; then echo "solq_lab needs Python 3.11 or newer; none was found. Install one, or name it: make PYTHON=/path/to/python3"; exit 1; fi
	@if ! command -v $${CXX:-c++} >/dev/null 2>&1; then echo "No C++ compiler found ($${CXX:-c++}): everything works, but deformable attention runs in pure torch, several times slower. Install g++ to change that."; fi
	@$(PYTHON) -m venv .venv || { echo "$(PYTHON) cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	$(if $(TORCH_INDEX),$(BIN)/python -m pip install --quiet --index-url $(TORCH_INDEX) $(shell grep -E '^torch(vision)?==' constraints.txt))
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[swin,sparse,slurm,export,tracking,video,dev]'
	@# Running notebooks leaves git clean: their outputs are stripped on the way into it (.gitattributes names the filter).
	@git rev-parse --git-dir >/dev/null 2>&1 && $(BIN)/nbstripout --install --attributes .gitattributes || true
	@touch $(STAMP)

clean:  ## remove the environment; runs/ and data/ stay
	rm -rf .venv build site *.egg-info
