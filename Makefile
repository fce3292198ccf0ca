# Everything a newcomer runs. Needs Python 3.11 and make; the rest comes from requirements/.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: quickstart quickstart-async compare lab docs slurm-deps test test-all check format clean

quickstart: $(STAMP)
	$(BIN)/megatron-vespo train examples/quickstart.yaml

# The same task with sampling and training side by side.
quickstart-async: $(STAMP)
	$(BIN)/megatron-vespo train examples/quickstart_async.yaml

# VESPO and GRPO at N = 64 (algorithm.staleness), three seeds each; goes on where it was stopped.
compare: $(STAMP)
	$(BIN)/megatron-vespo ablate examples/lab/compare.yaml --out runs/compare

# The lab: `make lab` is its central question, `make lab-NAME` any grid of examples/lab. Stops after about an hour; the
# same command goes on, and what is done is in runs/lab/NAME/comparison.html and results/NAME.json.
lab: lab-staleness

lab-%: $(STAMP)
	$(BIN)/megatron-vespo ablate examples/lab/$*.yaml --out runs/lab/$* --minutes 55 --results results/$*.json

lab-long_sums: runs/lab/bases/sumlong
runs/lab/bases/%: | $(STAMP)
	$(BIN)/python tools/make_tiny_base.py --recipe examples/lab/tasks/$*.base.yaml

test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile --durations=30 -m "not slow"

test-all: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

# For tests/slurm and tools/slurm_sandbox.py (Debian, Ubuntu). Services that a package starts do not matter: a sandbox has
# daemons, ports, sockets and files of its own.
SLURM_PROGRAMS := slurmctld slurmd sbatch munged shellcheck
slurm-deps:
	@PATH="$$PATH:/usr/sbin"; missing=; \
	for program in $(SLURM_PROGRAMS); do command -v $$program >/dev/null || missing="$$missing $$program"; done; \
	if [ -z "$$missing" ]; then exit 0; fi; \
	if ! command -v apt-get >/dev/null; then echo "slurm-deps: no apt-get here; install Slurm, MUNGE and shellcheck" >&2; exit 1; fi; \
	if [ "$$(id -u)" != 0 ]; then echo "slurm-deps: apt-get needs root: sudo make slurm-deps" >&2; exit 1; fi; \
	install="apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge shellcheck"; \
	export DEBIAN_FRONTEND=noninteractive; $$install || { apt-get update && $$install; }

# The documentation as a site: build/site/index.html
docs: $(STAMP)
	$(BIN)/python tools/write_config_reference.py
	$(BIN)/python tools/write_results.py
	$(BIN)/mkdocs build --strict --quiet

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The lock is complete, so nothing is resolved again (--no-deps); torch goes first, with whatever its build needs.
$(STAMP): requirements/cpu.lock setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || python3 -m venv $(VENV)
	$(BIN)/python -c 'import sys; sys.exit(0 if sys.version_info[:2] == (3, 11) else "Python 3.11 is needed: make PYTHON=/path/to/python3.11")'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $$(grep '^torch==' requirements/cpu.lock)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements/cpu.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $(STAMP)

clean:
	rm -rf $(VENV) runs build *.egg-info
