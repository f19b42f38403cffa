# make train    trains on the built-in digits, then evaluates; minutes on two cores
# make test     ruff, mypy and the tests
# make bench    times everything against its baselines, into bench/results/
#
# Each sets up a virtual environment from pinned requirements first, when it is missing or old.
# Variables: PYTHON (the interpreter it is made with), VENV (where), PIP_ARGS (for pip install),
# PRECISION (of training and sampling: bf16, fp32, or fp16 on a GPU before sm_80), TRAIN_ARGS
# (--section.key value ...), PYTEST_ARGS, BENCH_ARGS.

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
PRECISION ?= bf16
TRAIN_ARGS ?=
PYTEST_ARGS ?=
BENCH_ARGS ?=

RUN := runs/digits
SAMPLED_fp32 := float32
SAMPLED_bf16 := bfloat16
SAMPLED_fp16 := float16
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --disable-pip-version-check --quiet $(PIP_ARGS)

.PHONY: train test bench clean

train: $(VENV)/.run
	$(PY) -m fpdm.train digits --train.out $(dir $(RUN)) --train.name $(notdir $(RUN)) \
		--train.precision $(PRECISION) --sample.dtype $(SAMPLED_$(PRECISION)) $(TRAIN_ARGS)
	$(PY) -m fpdm.evaluate $(RUN)
	@echo "the digits it draws: $$(ls $(RUN)/samples/*.png | tail -n 1)"

test: $(VENV)/.dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy -p fpdm -p bench
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(PY) -m pytest -n auto $(PYTEST_ARGS)

bench: $(VENV)/.dev
	$(PY) -m bench $(BENCH_ARGS)
	$(PY) -m bench --render

$(VENV)/.python:
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 10) <= v < (3, 14) else f"got Python {v[0]}.{v[1]}, expected 3.10 to 3.13: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

# --no-build-isolation: setuptools and wheel are pinned there too
$(VENV)/.run: requirements/run.txt pyproject.toml setup.py $(wildcard csrc/*.cpp csrc/cpu/*) | $(VENV)/.python
	$(PIP) -r requirements/run.txt
	$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.dev: requirements/dev.txt requirements/triton.txt $(VENV)/.run
	$(PIP) -r requirements/dev.txt
	$(PY) -c 'import triton' 2>/dev/null || $(PIP) -r requirements/triton.txt
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
