# Everything runs in .venv, which is made from pyproject.toml on first use. Needs only Python (3.11 or newer) and make.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
TRAINED := runs/quickstart

.DEFAULT_GOAL := help
.PHONY: help setup quickstart studio test soak lint docs bench gpu clean

help:
	@echo "make quickstart   set up, train a plain and an aligned flow on digits, write runs/quickstart/report.html"
	@echo "make studio       set up, train the quickstart's flows if they are not there, serve a page to draw, classify and edit with them"
	@echo "make test         set up, run the tests"
	@echo "make soak         the tests that take long, such as a scan of a million files"
	@echo "make lint         ruff check, ruff format --check, pyright, import-linter, pip-audit of what is installed"
	@echo "make docs         the documentation as a site, in site/; a broken link or reference fails"
	@echo "make bench        the benchmarks, as tables and JSON"
	@echo "make gpu          on a machine with an accelerator: tests, quickstart and benchmarks on it, in under ten minutes"
	@echo "make setup        only make .venv        make clean   remove .venv and caches (runs/ stays)"

setup: $(READY)

$(READY): pyproject.toml
	@echo "setting up .venv: PyTorch and its friends, some GB and minutes where they are not cached …"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off --editable '.[dev]'
	$(BIN)/python -c "import flowback"
	@touch $(READY)

quickstart: setup
	$(BIN)/flowback quickstart

studio: setup $(TRAINED)/report.json
	$(BIN)/flowback studio $(TRAINED)

test: setup
	$(BIN)/python -m pytest -n 2 --dist worksteal

soak: setup
	$(BIN)/python -m pytest -m soak

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/pip-audit --skip-editable --progress-spinner off

docs: setup
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off --quiet --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

$(TRAINED)/report.json: | $(READY)
	$(BIN)/flowback quickstart

bench: setup $(TRAINED)/report.json
	for file in benchmarks/*.py; do \
		case $$file in */gpu.py) continue;; esac; \
		case $$file in */convergence.py|*/decoding.py|*/refinement.py|*/studio.py) run=$(TRAINED)/aligned;; *) run=;; esac; \
		$(BIN)/python $$file $$run || exit 1; \
	done

gpu: setup
	$(BIN)/python benchmarks/gpu.py

clean:
	rm -rf .venv .cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
