# Everything a newcomer runs. Needs Python 3.11 and make; the rest comes from requirements/.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: quickstart quickstart-async compare docs test test-all check format clean

quickstart: $(STAMP)
	$(BIN)/megatron-vespo train examples/quickstart.yaml

# The same task with sampling and training side by side.
quickstart-async: $(STAMP)
	$(BIN)/megatron-vespo train examples/quickstart_async.yaml

# VESPO and GRPO at staleness 64, three seeds each; goes on where it was stopped.
compare: $(STAMP)
	$(BIN)/megatron-vespo ablate examples/lab/compare.yaml --out runs/compare

test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile --durations=30 -m "not slow"

test-all: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

# The documentation as a site: build/site/index.html
docs: $(STAMP)
	$(BIN)/python tools/write_config_reference.py
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
