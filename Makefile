# make demo   prepare the demo corpus, distil, print the table of error rates; SYSTEM=nar: another system's
# make test   run the unit tests
# make test-all   run all tests: test, test-recipes (every recipe on small corpora), test-faults (kills, damage)
# make test-k2    the tests of k2, in an environment of its own (Python 3.11, 3.5 GB)
# make test-espnet   our searches against ESPnet's, in an environment of its own
# make test-native   build kaldifeat and fast_rnnt from source and test with them (minutes of compiling)
# make test-slurm    a night on a Slurm of this machine alone (Debian's packages, root); minutes
# make scale  a dry run of an epoch of a million cuts without audio: fails when memory grows (minutes)
# make lint   ruff and shellcheck
# make env    the virtual environment that the others use (made by them when needed)
# make clean  remove caches; data and experiments stay
#
# Variables: PYTHON=python3.12 (for a new environment), TESTS=tests/labels (with make test: these paths alone),
# TEST_JOBS=2 (test files at the same time), SYSTEM=mvq, nar, hkd, dualmode or hubert and DEMO_SHORT=1 (with make demo: which, and shortened).

SHELL := /bin/bash
VENV ?= .venv
VENV_K2 ?= .venv-k2
VENV_ESPNET ?= .venv-espnet
PYTHON ?=
TESTS ?=
TEST_JOBS ?= 2
DEMO_SHORT ?=
SYSTEM ?= mvq
SCALE_CUTS ?= 1000000
export VENV VENV_K2 VENV_ESPNET PYTHON TEST_JOBS

.PHONY: env demo test test-recipes test-faults test-all test-k2 test-espnet test-native test-slurm scale lint clean
.DEFAULT_GOAL := demo

env:
	@local/make_env.sh

demo: env
	@source $(VENV)/bin/activate && cd egs/librispeech && \
	  ./run_$(SYSTEM).sh --corpus demo $(if $(filter-out 0,$(DEMO_SHORT)),--short true)

test: env
	@local/test_all.sh unit -- $(TESTS)

test-recipes test-faults: test-%: env
	@local/test_all.sh $*

test-all: env
	@local/test_all.sh

test-k2:
	@local/make_k2_env.sh
	@PYTHONPATH=. $(VENV_K2)/bin/python -m pytest -q tests/with_k2

test-espnet:
	@local/make_espnet_env.sh
	@PYTHONPATH=. $(VENV_ESPNET)/bin/python -m pytest -q tests/with_espnet

test-native: env
	@local/test_native.sh

test-slurm: env
	@local/test_slurm.sh

scale: env
	@PYTHONPATH=. $(VENV)/bin/python benchmarks/scale.py --cuts $(SCALE_CUTS) --check

lint: env
	@code=0; $(VENV)/bin/ruff check . || code=1; \
	{ git ls-files '*.sh' .ci/run 2> /dev/null || find . -name '*.sh' -not -path './$(VENV)/*' -not -path './.venv-*'; } \
	  | xargs $(VENV)/bin/shellcheck && echo "shellcheck: All checks passed!" || code=1; \
	exit $$code

clean:
	@find . -path './.venv*' -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf
	@rm -rf .pytest_cache .ruff_cache build icefall_kd.egg-info
	@echo "Caches are gone.  Kept, to be removed by hand:"
	@du -sh $(VENV) .venv-* egs/*/data egs/*/exp egs/*/download 2> /dev/null || true
