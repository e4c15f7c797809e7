# make train   set up, then train the default language model and print its bits per byte
# make test    set up, then run every test
# make test-compiled   every kernel test on compiled code of two targets, executed on the CPU
# make bench   set up, then measure what this device is for (ARGS=--quick: toy sizes)
# make gpu     on a GPU machine: every answer it can give, in nine minutes
# All but the last need only Python 3.11 or newer, make and a package registry.
.PHONY: train test test-compiled gpu gpu-test gpu-setup lint bench clean

VENV ?= .venv
PYTHON ?= python3
PY := $(VENV)/bin/python
RUN_DIR ?= runs/lm

# Python may keep what it has compiled: uv leaves that to the first import, and torch is large
export PYTHONDONTWRITEBYTECODE :=

# uv is quicker than pip, but knows nothing of pip's find-links: hand them over where there are any
export UV_FIND_LINKS ?= $(or $(PIP_FIND_LINKS),$(shell $(PYTHON) -m pip config get global.find-links 2>/dev/null))

$(VENV)/.ok: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	{ $(PY) -m pip install -q uv && $(VENV)/bin/uv pip install -q --python $(PY) -c constraints.txt -e '.[dev]'; } \
	  || $(PY) -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

train: $(VENV)/.ok
	$(PY) train/lm.py --preset tiny --minutes 7 --eval-every 1000 --run-dir $(RUN_DIR) $(ARGS)

test: $(VENV)/.ok
	$(PY) -m pytest -n 2 --dist loadfile $(ARGS)
	$(if $(ARGS),,$(COMPILED) CHOICE=@tests/machine/chosen.txt)

# what Triton compiles for a target, executed by tests/machine, a process each
COMPILED = $(MAKE) -j2 --output-sync --no-print-directory compiled-sm_80 compiled-sm_90
CHOICE = tests/machine tests/test_kernels.py tests/test_dispatch.py

test-compiled: $(VENV)/.ok
	$(COMPILED)
	KRU_ALL_TARGETS=1 $(PY) -m pytest tests/test_kernels_compiled.py

compiled-%:
	CUDA_VISIBLE_DEVICES= KRU_TARGET=$* $(PY) -m pytest -q -k "not environment and not interpreter" $(CHOICE)

# On a GPU machine, with its own python: torch, triton, numpy and pytest are all it needs.
#   make gpu                            all parts, in order of worth, in at most nine minutes
#   make gpu PART="c d" BUDGET=200      some of them, by letter or name, in so many seconds
#   make gpu DEVICE=cpu QUICK=--quick   a rehearsal on toy sizes, rows to build/bench
# a compile, b correct, c micro, d steps, e models, f learn: bench/README.md. Rows and a table go to
# OUT; they name the commit, which a copy without git is told by BENCH_COMMIT=hash. The same call
# again goes on where one was cut off, where OUT has the rows of before.
QUICK ?=
OUT ?= $(if $(QUICK),build/bench,bench/results)
PART ?= a b c d e f
BUDGET ?= 540
DEVICE ?= auto

# pip where it can, else the folders where an installation would have them
gpu-setup:
	$(PYTHON) -c 'import kru_triton.kernels' 2>/dev/null \
	  || $(PYTHON) -m pip install -q --no-deps --no-build-isolation -e . \
	  || { ln -sfn ../kernels kru_triton/kernels && ln -sfn ../train kru_triton/train; }

gpu: gpu-setup
	$(PYTHON) -m bench gpu --part $(PART) --budget $(BUDGET) --device $(DEVICE) --out $(OUT) $(QUICK) $(ARGS)

gpu-test: gpu-setup
	$(PYTHON) -m pytest -m gpu $(patsubst %,tests/test_%.py,kernels conformance dispatch lstm) $(ARGS)

lint: $(VENV)/.ok
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

bench: $(VENV)/.ok
	$(PY) -m bench $(or $(ARGS),--all)

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
