# The reproducibility benchmark of PoF. `make help` lists what there is.

PROFILE     ?= quick
JOBS        ?= 0
DEVICE      ?= auto
DATA_DIR    ?= data
RUNS_DIR    ?= runs
RESULTS_DIR ?= results
EXECUTOR    ?= local
CLUSTER     ?=
WATCH       ?=
SEEDS_AT_ONCE ?= 1
ROWS        ?=
OUT         ?= packed-data

# PYTHON makes the virtual environment in VENV. With VENV= (empty) nothing is installed and PYTHON
# is used as it is, packages and all.
PYTHON ?= python3
VENV   ?= .venv

ifeq ($(strip $(VENV)),)
PY    := $(PYTHON)
READY :=
else
PY    := $(VENV)/bin/python
READY := $(VENV)/.ready
endif

.DEFAULT_GOAL := help
.PHONY: help setup reproduce-table hessian report plan calibrate campaign pack-data speed status cancel resubmit slurm-up slurm-down test-slurm doctor test lint clean

help:  ## List the targets and the variables they take
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | \
	  awk -F'\t' '{ printf "  make %-17s %s\n", $$1, $$2 }'
	@printf '\n  PROFILE=%s JOBS=%s DEVICE=%s DATA_DIR=%s RUNS_DIR=%s RESULTS_DIR=%s\n' \
	  $(PROFILE) $(JOBS) $(DEVICE) $(DATA_DIR) $(RUNS_DIR) $(RESULTS_DIR)
	@printf '  EXECUTOR=slurm CLUSTER=FILE.toml: on a Slurm cluster, see slurm/README.md.\n'
	@printf '  SEEDS_AT_ONCE=4: a worker trains four seeds at once (for a small network on a GPU).\n'
	@printf '  JOBS=0: a worker a core (one on a GPU). VENV= : use PYTHON=%s and its packages.\n' $(PYTHON)

setup: $(READY)  ## Make the virtual environment with the pinned packages

$(VENV)/.ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is older than Python 3.11: name a newer one with PYTHON=…"; exit 1; }
	@echo "setting up $(VENV) (once; a few minutes) …"
	@$(PYTHON) -m venv $(VENV) || \
	  { echo "no virtual environment could be made: install Debian's package python3-venv"; exit 1; }
	@$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

reproduce-table: $(READY)  ## Train what is missing of PROFILE and write its table of test errors
	@$(PY) -m benchmarks reproduce-table --profile $(PROFILE) --jobs $(JOBS) --device $(DEVICE) \
	  --data-dir $(DATA_DIR) --runs-dir $(RUNS_DIR) --results-dir $(RESULTS_DIR) \
	  --executor $(EXECUTOR) $(if $(CLUSTER),--cluster $(CLUSTER)) --seeds-at-once $(SEEDS_AT_ONCE)

resubmit: $(READY)  ## Start failed runs of PROFILE again on the Slurm cluster CLUSTER
	@$(PY) -m benchmarks resubmit --profile $(PROFILE) --device $(DEVICE) \
	  --data-dir $(DATA_DIR) --runs-dir $(RUNS_DIR) --results-dir $(RESULTS_DIR) \
	  $(if $(CLUSTER),--cluster $(CLUSTER))

cancel: $(READY)  ## Cancel the Slurm jobs of PROFILE and nothing else
	@$(PY) -m benchmarks cancel --profile $(PROFILE) --runs-dir $(RUNS_DIR)

hessian: $(READY)  ## Measure the landscape around the networks of PROFILE; train what is missing
	@$(PY) -m benchmarks hessian --profile $(PROFILE) --jobs $(JOBS) --device $(DEVICE) \
	  --data-dir $(DATA_DIR) --runs-dir $(RUNS_DIR) --results-dir $(RESULTS_DIR) \
	  --executor $(EXECUTOR) $(if $(CLUSTER),--cluster $(CLUSTER)) --seeds-at-once $(SEEDS_AT_ONCE)

report: $(READY)  ## Rebuild tables, plots and pages of PROFILE from the records of its runs
	@$(PY) -m benchmarks report --profile $(PROFILE) --results-dir $(RESULTS_DIR)

plan: $(READY)  ## Say what PROFILE costs before it is launched: time, disk, when it is finished
	@$(PY) -m benchmarks plan --profile $(PROFILE) --runs-dir $(RUNS_DIR) \
	  $(if $(CLUSTER),--cluster $(CLUSTER))

calibrate: $(READY)  ## Measure what the steps of PROFILE cost on this device
	@$(PY) -m benchmarks calibrate --profile $(PROFILE) --jobs $(JOBS) --device $(DEVICE) \
	  --data-dir $(DATA_DIR) --runs-dir $(RUNS_DIR)

speed: $(READY)  ## Measure speed beside limits and peers; ROWS="sam-step range-search": these alone
	@$(PY) -m benchmarks speed $(foreach row,$(ROWS),'$(row)') --device $(DEVICE) \
	  --data-dir $(DATA_DIR) --results-dir $(RESULTS_DIR)

status: $(READY)  ## Show where the runs of PROFILE stand
	@$(PY) -m benchmarks status --profile $(PROFILE) --runs-dir $(RUNS_DIR) $(if $(WATCH),--watch)

campaign: $(READY)  ## Measure speed, train PROFILES (gpu-…) for MINUTES (9.5), resumably: a machine on loan
	@$(PY) -m benchmarks campaign $(PROFILES) $(if $(MINUTES),--minutes $(MINUTES)) \
	  $(if $(filter no,$(SPEED)),--no-speed) $(foreach row,$(ROWS),--row '$(row)') \
	  $(if $(PACK),--pack $(PACK)) $(if $(PACK_MEGABYTES),--pack-megabytes $(PACK_MEGABYTES)) \
	  $(if $(PACK_RESULTS),--pack-results $(PACK_RESULTS)) \
	  --jobs $(JOBS) --device $(DEVICE) --seeds-at-once $(SEEDS_AT_ONCE) \
	  --data-dir $(DATA_DIR) --runs-dir $(RUNS_DIR) --results-dir $(RESULTS_DIR)

pack-data: $(READY)  ## Gather the data of PROFILES (gpu-…) in OUT, for a machine without network
	@$(PY) -m benchmarks pack-data $(PROFILES) --out $(OUT) --data-dir $(DATA_DIR)

doctor: $(READY)  ## Check data sets, packages, device, disk and write access
	@$(PY) -m benchmarks doctor --data-dir $(DATA_DIR) --runs-dir $(RUNS_DIR)

test: $(READY)  ## Run the whole test suite
	@$(PY) slurm/loopback.py hint
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist worksteal

test-slurm: $(READY)  ## Run the tests that need a Slurm, on a real one on the loopback
	@OMP_NUM_THREADS=1 $(PY) slurm/loopback.py run $(PY) -m pytest tests/slurm

slurm-up: $(READY)  ## Start a real two-node Slurm on this machine's loopback, to try things on
	@$(PY) slurm/loopback.py up

slurm-down: $(READY)  ## Stop it
	@$(PY) slurm/loopback.py down

lint: $(READY)  ## Check formatting, style and types
	@$(PY) -m ruff format --check .
	@$(PY) -m ruff check .
	@$(PY) -m mypy

clean:  ## Remove the virtual environment and caches; data, runs and results stay
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
