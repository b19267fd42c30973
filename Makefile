# make demo | make test | make test-oldest-timm | make test-cuda | make faults | make lint | make types | make docs: each sets
# up what it needs in .venv, once, and runs.
# With BIN=/usr/bin, say, all of them take the python there as it is and install nothing, as without a network.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Where it writes; make demo OUT=somewhere ARGS="--iterations 1000" passes options on.
demo: OUT ?= smi-fast-output
gpu-check: OUT ?= bench/results
ARGS ?=
# By pytest-xdist, a file of tests a process; empty where it is not installed.
PARALLEL ?= -n auto --dist loadfile
SOURCES := pyproject.toml constraints.txt
OLDEST_TIMM := $(shell sed -n 's/^ *"timm>=\([0-9.]*\)".*/\1/p' pyproject.toml)
# The tests whose outcome hangs on timm's version.
TIMM_TESTS := $(addprefix tests/backbones/test_,coverage.py support.py timms_tools.py)

SET_UP = $(if $(filter file,$(origin BIN)),$(VENV)/.installed-$(1))

.PHONY: demo test test-oldest-timm test-cuda faults lint types docs bench gpu-check clean

demo: $(call SET_UP,viz)
	$(BIN)/smi-fast invert --out "$(OUT)" --overwrite $(ARGS)

test: $(call SET_UP,test)
	$(BIN)/python -m pytest -m "not cuda" $(PARALLEL) $(ARGS)

# timm lies in a folder of its own, which comes first. The newest is in constraints.txt, and make test takes it.
test-oldest-timm: $(call SET_UP,test) $(VENV)/.timm-$(OLDEST_TIMM)
	PYTHONPATH="$(abspath $(VENV)/timm-$(OLDEST_TIMM))" $(BIN)/python -m pytest -m "not cuda" $(PARALLEL) $(TIMM_TESTS) $(ARGS)

$(VENV)/.timm-%: | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(VENV)/timm-$* timm==$*
	@touch $@

test-cuda: $(call SET_UP,test)
	$(BIN)/python -m pytest -m cuda $(ARGS)

# Processes that are killed at a hundred random moments and at each change of their folders, and other faults: half an hour.
faults: $(call SET_UP,test)
	SMI_FAST_FAULTS=100 $(BIN)/python -m pytest tests/faults -rA $(PARALLEL) $(ARGS)

lint: $(call SET_UP,test)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

# A program with types against the annotations of the package, laid out as it is installed, and not as in a checkout.
types: $(call SET_UP,test)
	rm -rf build/types && mkdir -p build/types
	cp -r smi_fast build/types/ && cp -r kernels build/types/smi_fast/
	MYPYPATH=build/types $(BIN)/python -m mypy

# Into build/site, strictly: a link that leads nowhere is an error. Set up beforehand, it needs no network.
docs: $(call SET_UP,test)
	NO_MKDOCS_2_WARNING=1 PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m mkdocs build --strict

bench: $(call SET_UP,bench)
	$(BIN)/python -m pytest bench $(ARGS)

# On a GPU: tests, compute-sanitizer, tuning, and the benchmarks of the kernels and of the loop with their report, at most
# nine minutes each. ARGS="--step tests" (or sanitize, tune, kernels, loop) runs one of them, and goes on where an earlier
# run stopped. ARGS="--smi-checkout PATH" measures the authors' published code too.
gpu-check: $(call SET_UP,bench)
	$(BIN)/python bench/gpu_check.py --out "$(OUT)" $(ARGS)

# One stamp for each set of extras, older than its sources when those change; nothing up to date is installed again.
$(VENV)/.installed-test: EXTRAS := test,viz,docs
$(VENV)/.installed-viz: EXTRAS := viz
$(VENV)/.installed-bench: EXTRAS := test,viz,bench
$(VENV)/.installed-%: $(SOURCES) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$(EXTRAS)]"
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 10) else "smi-fast needs Python >= 3.10; %s is %d.%d. Name another with make PYTHON=..." % (sys.executable, v[0], v[1]))'
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) build dist *.egg-info
