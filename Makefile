SHELL = /bin/bash
LINT_PATHS = sb3_softq tests examples

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

format: ## format the code, sort imports
	ruff format $(LINT_PATHS)
	ruff check --select I --fix $(LINT_PATHS)

lint: ## ruff
	ruff check $(LINT_PATHS)
	ruff format --check $(LINT_PATHS)

type: ## mypy
	mypy

pytest: ## tests, two workers with one torch thread each; shows the slowest ten
	OMP_NUM_THREADS=1 pytest -n 2 --dist worksteal --durations=10

pytest-slow: ## tests that learn for minutes
	OMP_NUM_THREADS=1 pytest -n 2 -m slow

commit-checks: lint type pytest ## what CI runs before make package

package: ## wheel and sdist, and a training with the wheel alone in a fresh environment
	.ci/package

.PHONY: help format lint type pytest pytest-slow commit-checks package
