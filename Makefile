# make demo   prepare the demo corpus, distil, print the table of error rates
# make test   run the tests
# make lint   ruff and shellcheck
# make env    the virtual environment that the others use (made by them when needed)
# make clean  remove caches; data and experiments stay
#
# Variables: PYTHON=python3.12 (for a new environment), TESTS=tests/labels, TEST_JOBS=2 (test files at the same time),
# DEMO_SHORT=1 (a shortened demo).

SHELL := /bin/bash
VENV ?= .venv
PYTHON ?=
TESTS ?=
TEST_JOBS ?= 2
DEMO_SHORT ?=
export VENV PYTHON

.PHONY: env demo test lint clean
.DEFAULT_GOAL := demo

env:
	@local/make_env.sh

demo: env
	@source $(VENV)/bin/activate && cd egs/librispeech && \
	  ./run_mvq.sh --corpus demo $(if $(filter-out 0,$(DEMO_SHORT)),--short true)

test: env
	@$(VENV)/bin/python -m pytest -q -n $(TEST_JOBS) --dist loadfile $(TESTS)

lint: env
	@code=0; $(VENV)/bin/ruff check . || code=1; \
	{ git ls-files '*.sh' .ci/run 2> /dev/null || find . -name '*.sh' -not -path './$(VENV)/*'; } \
	  | xargs $(VENV)/bin/shellcheck && echo "shellcheck: All checks passed!" || code=1; \
	exit $$code

clean:
	@find . -path ./$(VENV) -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf
	@rm -rf .pytest_cache .ruff_cache build icefall_kd.egg-info
	@echo "Caches are gone.  Kept, to be removed by hand:"
	@du -sh $(VENV) egs/*/data egs/*/exp egs/*/download 2> /dev/null || true
