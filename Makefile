# Each target sets up what it needs in .venv: the pinned requirements, then the wheel built from this tree.
# Everything runs on that wheel; the tests run inside .venv's folder, so that no checkout lies on sys.path.

PYTHON ?= python3
VENV := $(CURDIR)/.venv
BIN := $(VENV)/bin
# Not compiled: most of what is installed is never imported, and Python compiles the rest when it is.
PIP := $(BIN)/pip install --quiet --no-compile

# One worker for each core, each with one thread. A test that is skipped because a package is missing fails.
TEST := cd $(VENV) && PYTHONPATH=$(CURDIR)/.ci OMP_NUM_THREADS=1 $(BIN)/pytest -c $(CURDIR)/pyproject.toml \
	--rootdir=$(CURDIR) -p strict_skips --numprocesses=auto --maxprocesses=8 --dist=loadgroup
TYPES := cd $(VENV) && $(BIN)/mypy --config-file $(CURDIR)/pyproject.toml -p initlab
BENCH := cd $(VENV) && $(BIN)/pytest -c $(CURDIR)/pyproject.toml --rootdir=$(CURDIR)

# Folders too: a deleted module must leave the wheel.
SOURCES := setup.py pyproject.toml $(wildcard README.md) $(shell find initlab kernels -not -path '*/__pycache__*')

.NOTPARALLEL:
.PHONY: demo test test-all docs bench gpu mutants clean

demo: $(VENV)/wheel.stamp $(VENV)/requirements-all.stamp
	mkdir -p build
	$(BIN)/initlab demo --html build/demo.html

# What guards a user's result. The types are checked beside the tests.
test: $(VENV)/wheel.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(TYPES) >$(VENV)/mypy.log 2>&1 & types=$$!; \
	$(TEST) --doctest-modules --pyargs initlab $(CURDIR)/tests; tests=$$?; \
	wait $$types || { cat $(VENV)/mypy.log; exit 1; }; exit $$tests

# And what takes long: every GPU's static costs, worlds of 4 and 8 ranks, the fault corpus, real libraries, pages in a
# browser.
test-all: test $(VENV)/requirements-all.stamp
	$(MAKE) docs
	.ci/install_chromium
	$(TEST) -m 'long and not large and not exhaustive' $(CURDIR)/tests

# The site, in build/site: pages of docs/, an API reference from the docstrings. A warning is an error.
docs: $(VENV)/wheel.stamp $(VENV)/requirements-docs.stamp
	cd $(VENV) && $(BIN)/python -m sphinx -q -W --keep-going -b html $(CURDIR)/docs $(CURDIR)/build/site
	@echo build/site/index.html

# Every suite, then a page of it. A case whose result is not right ends it all.
bench: export INITLAB_BENCH_RESULTS := $(CURDIR)/benchmarks/results/bench.json
bench: export INITLAB_BENCH_COMMAND := make bench
bench: $(VENV)/wheel.stamp $(VENV)/requirements-all.stamp
	$(BENCH) --benchmark-only --exitfirst $(CURDIR)/benchmarks
	$(BIN)/python $(CURDIR)/benchmarks/page.py benchmarks/results/bench.json build/bench.html

# From the bare checkout, with the python at hand: installs nothing. OUT names a folder for the results; DRY=1 runs it
# without a GPU, at sizes that say nothing; SANITIZE=1 runs the kernels under compute-sanitizer and times nothing.
gpu:
	$(PYTHON) benchmarks/gpu $(if $(DRY),--dry) $(if $(SANITIZE),--sanitize) $(OUT)

# Breaks the compiled kernels on purpose and lists what no check notices. Half an hour; writes tests/ptx/mutants.md.
mutants: $(VENV)/wheel.stamp
	cd $(VENV) && $(BIN)/python $(CURDIR)/tests/ptx/mutants.py --write $(CURDIR)/tests/ptx/mutants.md

clean:
	rm -rf $(VENV) build dist *.egg-info

$(VENV)/wheel.stamp: $(VENV)/requirements.stamp $(SOURCES)
	rm -rf $(VENV)/dist
	$(BIN)/python -m build --quiet --no-isolation --outdir $(VENV)/dist
	$(PIP) --no-deps --force-reinstall $(VENV)/dist/*.whl
	$(BIN)/pip check
	touch $@

$(VENV)/requirements.stamp: .ci/requirements.txt
	$(PYTHON) -m venv --clear $(VENV)
	$(PIP) --requirement .ci/requirements.txt
	touch $@

$(VENV)/requirements-all.stamp: $(VENV)/requirements.stamp .ci/requirements-all.txt
	$(PIP) --requirement .ci/requirements-all.txt
	touch $@

$(VENV)/requirements-docs.stamp: $(VENV)/requirements.stamp .ci/requirements-docs.txt
	$(PIP) --requirement .ci/requirements-docs.txt
	touch $@
