# Two commands matter: `make demo` and `make test`. Both set up .venv on their own.
# PYTHON picks the interpreter that makes .venv: `make demo PYTHON=python3.12`.

PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help demo test lint types docs docs-output findings kernels calibrations notebooks bench bench-week clean

help:
	@echo 'make demo    energy of the built-in azure_code workload on an A100'
	@echo 'make test    the test suite'
	@echo 'make lint    ruff and the import contracts'
	@echo 'make types   mypy --strict on energymodel/'
	@echo 'make docs    the documentation as a site, in build/site'
	@echo 'make findings  findings of the paper beside ours, into docs/'
	@echo 'make calibrations  the shipped calibrations from the measurements, into profiles/'
	@echo 'make kernels  tables and figures of the measured kernels, into docs/'
	@echo 'make notebooks  run the notebooks and keep their outputs'
	@echo 'make bench   speed and memory, in some minutes; bench-week: of 44 million requests'
	@echo 'make clean   remove .venv and everything built'

demo: .venv/.installed
	$(BIN)/energymodel predict --trace azure_code --gpu a100

# Each worker with one thread for its small matrices: threads of two workers wait for each other.
test: .venv/.installed-dev
	OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

lint: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: .venv/.installed-dev
	$(BIN)/mypy

docs: .venv/.installed-dev
	$(BIN)/typer energymodel.cli utils docs --name energymodel --output docs/cli.md
	$(BIN)/zensical build --strict

# Runs every command in README.md and docs/, and writes what it prints today into the page.
docs-output: .venv/.installed-dev
	$(BIN)/python tests/docs_blocks.py

# Writes the paper's findings into their page, as the tool predicts them today.
findings: .venv/.installed-dev
	$(BIN)/energymodel reproduce --format markdown --output docs/paper-findings.md --figure docs/img/paper-findings.png

# Fits the shipped calibrations to the committed measurements again, and transfers the others.
DATA := calibration/data
FIT := $(BIN)/energymodel fit --split $(DATA)/split.json
UNMEASURED := a100 a100-40gb a100-pcie-80gb h100-pcie b200 l40s a6000 rtx-6000-ada l4 mi300x
calibrations: .venv/.installed-dev
	$(FIT) $(DATA)/kernels/h100-* $(DATA)/serving/h100-* --start $(DATA)/start/h100.json --out profiles/calibrations/h100.json
	$(FIT) $(DATA)/kernels/h200-* $(DATA)/serving/h200-* --start h100 --out profiles/calibrations/h200.json
	$(BIN)/python -m calibration.fitting.transfer $(UNMEASURED) --measured h100

# Writes the page on measured kernels and its figures from the raw windows.
kernels: .venv/.installed-dev
	$(BIN)/python -m calibration.validation.kernel_page

# Runs the notebooks and keeps what they print and draw.
notebooks: .venv/.installed-dev
	$(BIN)/python tests/notebook_runs.py

bench: .venv/.installed-dev
	@for name in simulator growth commands estimate_error; do \
	  echo "== benchmarks/$$name.py"; $(BIN)/python benchmarks/$$name.py || exit 1; done

# A week of fleet traffic, 44 million requests: needs 2 GB in the temporary folder.
bench-week: .venv/.installed-dev
	$(BIN)/python benchmarks/growth.py week

clean:
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps are renewed only when pyproject.toml changes.
.venv/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "energymodel needs Python 3.11 or newer; try 'make $(MAKECMDGOALS) PYTHON=python3.12'"; exit 1; }
	$(PYTHON) -m venv .venv
	touch $@

.venv/.installed: pyproject.toml | .venv/.created
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

.venv/.installed-dev: pyproject.toml | .venv/.created
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@ .venv/.installed
