SHELL = /bin/bash
LINT_PATHS = sb3_softq tests examples

format:
	ruff format $(LINT_PATHS)
	ruff check --select I --fix $(LINT_PATHS)

lint:
	ruff check $(LINT_PATHS)
	ruff format --check $(LINT_PATHS)

type:
	mypy

# one worker per core, one torch thread each
pytest:
	OMP_NUM_THREADS=1 pytest -n 2

pytest-slow:
	OMP_NUM_THREADS=1 pytest -n 2 -m slow

commit-checks: lint type pytest

.PHONY: format lint type pytest pytest-slow commit-checks
