# make demo | make test | make test-cuda | make lint: each sets up what it needs in .venv, once, and runs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Where the demo writes; make demo OUT=somewhere ARGS="--iterations 1000" passes options on.
OUT ?= smi-fast-output
ARGS ?=
SOURCES := pyproject.toml constraints.txt

.PHONY: demo test test-cuda lint bench clean

demo: $(VENV)/.installed-viz
	$(BIN)/smi-fast invert --out $(OUT) --overwrite $(ARGS)

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m "not cuda" $(ARGS)

test-cuda: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m cuda $(ARGS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

bench: $(VENV)/.installed-bench
	$(BIN)/python -m pytest bench $(ARGS)

# One stamp for each set of extras, older than its sources when those change; nothing up to date is installed again.
$(VENV)/.installed-test: EXTRAS := test,viz
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
