# PYTHON=.venv/bin/python by default; `make test PYTHON=python` uses the one on the path.
PYTHON ?= .venv/bin/python

.PHONY: check test test-all bench golden

check:
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy

test:
	$(PYTHON) -m pytest -m "not slow" -n auto --dist loadfile --no-loadscope-reorder -q --durations=15

test-all:
	JAX_DISABLE_MOST_OPTIMIZATIONS=0 $(PYTHON) -m pytest -n auto --dist loadfile --no-loadscope-reorder -q --durations=20

bench:
	for script in benchmarks/bench_*.py; do $(PYTHON) -m benchmarks.$$(basename $$script .py) || exit 1; done

golden:
	$(PYTHON) -m tests.make_golden
	$(PYTHON) -m tests.make_golden_schedulers
