# make demo   set up, then train, save, resume, export and check a small model on this machine
# make test   set up, then the tests; ARGS="-k name" passes on to pytest
# make test-fast  set up, then the tests of one process and one world: a family's layouts against transformers
# make test-slow  set up, then the tests that take minutes each and that `make test` leaves out
# make bench  set up, then the benchmarks
# make lint   set up, then ruff and mypy
# make docs   set up, then the pages of docs/ as a site, links and anchors checked (needs mkdocs-material)
# make settings  set up, then docs/settings.md from the schema
#
# Set-up needs Python 3.10 or newer with venv and makes .venv. PYTHON=... picks the interpreter;
# TORCH_INDEX=URL picks another torch build (CPU only, or another CUDA) than the default one.

PYTHON ?=
TORCH_INDEX ?=
ARGS ?=
ALONE := tests/unit tests/architecture tests/interpreter
SLURM := tests/slurm
SHARED := -n 2 --dist loadfile --no-loadscope-reorder
ONE_WORLD := 'tests/parity/test_layouts.py::test_every_layout_equals_transformers[qwen2_5_vl]'
BIN := .venv/bin

# Ranks share the cores; `rb launch` gives each its own share.
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-fast test-slow bench lint settings docs clean
.DELETE_ON_ERROR:

demo: .venv/.ready
	$(BIN)/rb demo

# Files of tests share the cores; a world's ranks wait for each other half of the time. Those of Slurm, whose clusters
# take the machine, come one after the other. Exit code 5: ARGS has picked none of these.
test: .venv/.ready
	@status=0; \
	$(BIN)/python -m pytest $(SHARED) $(ALONE) $(ARGS) || [ $$? = 5 ] || status=1; \
	$(BIN)/python -m pytest $(SHARED) tests $(addprefix --ignore=,$(ALONE) $(SLURM)) $(ARGS) || [ $$? = 5 ] || status=1; \
	$(BIN)/python -m pytest $(SLURM) $(ARGS) || [ $$? = 5 ] || status=1; \
	exit $$status

test-fast: .venv/.ready
	$(BIN)/python -m pytest $(SHARED) $(ALONE) $(ONE_WORLD) $(ARGS)

test-slow: .venv/.ready
	$(BIN)/python -m pytest -m slow $(ARGS)

bench: .venv/.ready
	$(BIN)/rb bench

lint: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy megatron_rb

settings: .venv/.ready
	$(BIN)/python -m megatron_rb.config.settings_page docs/settings.md

docs: settings
	@$(BIN)/python -c 'import material' 2>/dev/null || \
	  $(BIN)/python -m pip install -c constraints.txt -e '.[docs]' >/dev/null 2>&1 || \
	  { echo "mkdocs-material could not be installed; the same pages can be read as docs/*.md" >&2; exit 1; }
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean:
	rm -rf .venv build site *.egg-info

.venv/.ready: setup.py pyproject.toml constraints.txt
	@set -e; chosen=; without_venv=; \
	for python in $(or $(PYTHON),python3 python3.12 python3.11 python3.13 python3.10); do \
	  "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1 || continue; \
	  "$$python" -c 'import ensurepip, venv' >/dev/null 2>&1 || { without_venv=$$python; continue; }; \
	  chosen=$$python; break; \
	done; \
	if [ -z "$$chosen" ] && [ -n "$$without_venv" ]; then \
	  echo "$$without_venv has no venv module; on Debian or Ubuntu: apt-get install python3-venv" >&2; exit 1; \
	elif [ -z "$$chosen" ]; then \
	  echo "no Python 3.10 or newer found; on Debian 12 or newer: apt-get install python3 python3-venv" >&2; exit 1; \
	fi; \
	$(BIN)/python -m pip --version >/dev/null 2>&1 || "$$chosen" -m venv --clear .venv; \
	echo "setting up .venv with $$($(BIN)/python -V) (minutes the first time)"
	$(BIN)/python -m pip install --quiet -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@
