# Each target sets up what it needs in .venv: the pinned requirements, then the wheel built from this tree.
# Everything runs on that wheel; the tests run inside .venv's folder, so that no checkout lies on sys.path.

PYTHON ?= python3
VENV := $(CURDIR)/.venv
BIN := $(VENV)/bin
PYTEST := cd $(VENV) && $(BIN)/pytest -c $(CURDIR)/pyproject.toml --rootdir=$(CURDIR)

# Folders too: a deleted module must leave the wheel.
SOURCES := setup.py pyproject.toml $(wildcard README.md) $(shell find initlab kernels -not -path '*/__pycache__*')

.PHONY: demo test bench gpu clean

demo: $(VENV)/wheel.stamp
	$(BIN)/initlab demo

test: $(VENV)/wheel.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd $(VENV) && $(BIN)/mypy --config-file $(CURDIR)/pyproject.toml -p initlab
	$(PYTEST) --doctest-modules --pyargs initlab $(CURDIR)/tests

bench: $(VENV)/wheel.stamp
	$(PYTEST) --benchmark-only $(CURDIR)/benchmarks

# From the bare checkout, with the python at hand: installs nothing. OUT names a folder for the results; DRY=1 runs it
# without a GPU, at sizes that say nothing.
gpu:
	$(PYTHON) benchmarks/gpu $(if $(DRY),--dry) $(OUT)

clean:
	rm -rf $(VENV) build dist *.egg-info

$(VENV)/wheel.stamp: $(VENV)/requirements.stamp $(SOURCES)
	rm -rf $(VENV)/dist
	$(BIN)/python -m build --quiet --no-isolation --outdir $(VENV)/dist
	$(BIN)/pip install --quiet --no-deps --force-reinstall $(VENV)/dist/*.whl
	$(BIN)/pip check
	touch $@

$(VENV)/requirements.stamp: .ci/requirements.txt
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/pip install --quiet --requirement .ci/requirements.txt
	touch $@
