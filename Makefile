.DEFAULT_GOAL := help
.PHONY: setup demo test test-all check dashboards clean help

setup:  ## make .venv with vLLM for CPU and all development tools
	@scripts/setup

demo: setup  ## run the demonstration; options go in ARGS="..."
	@.venv/bin/python examples/demo.py $(ARGS)

test: setup check  ## checks, then the test suite; options for pytest go in ARGS="..."
	@scripts/test $(ARGS)
	@$(if $(ARGS),,scripts/test servers)

test-all: setup check  ## as test, and what repeats on another engine
	@scripts/test
	@scripts/test all-servers

check: setup  ## format, lint, types and import contracts
	@scripts/check

dashboards: setup  ## write the files of dashboards/ that are made from code
	@.venv/bin/python -m ep_rebalance.dashboards.build dashboards

clean:  ## remove .venv, caches and build output
	@rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

help:  ## print this list
	@sed -n 's/^\([a-z-]*\):.*##/make \1 -/p' $(MAKEFILE_LIST)
