# make train   set up, then train the default language model and print its bits per byte
# make test    set up, then run every test
# make test-compiled   every kernel test on compiled code of two targets, executed on the CPU
# make bench   set up, then measure what this device is for (ARGS=--quick: toy sizes)
# make gpu     on a GPU machine: tests, benchmarks, tuning, a training run
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
	$(PY) train/lm.py --minutes 7 --eval-every 1000 --run-dir $(RUN_DIR) $(ARGS)

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
#   make gpu            everything, in order of worth
#   make gpu PART=2     one part; each stops in time for a limit of ten minutes a call, and the same
#                       call again goes on where it stopped
#   make gpu DEVICE=cpu QUICK=--quick   all of it on toy sizes, rows to build/bench
# 1 GPU tests, 2 kernels against others, 3 tuning, 4 training steps, 5 decoding, 6 a training run.
# All rows go to OUT (keep its files, or put them into bench/results, to go on from them); they name
# the commit, which a copy without git is told by BENCH_COMMIT=hash. Part 1 has no rows: what it
# compiled is in triton's cache the next time. A machine
# without train/lm.py's packages takes them as wheels: make gpu PART=6 WHEELS=folder
QUICK ?=
OUT ?= $(if $(QUICK),build/bench,bench/results)
PART ?= 1 2 3 4 5 6
DEVICE ?= auto
MINUTES ?= 8
SITE := build/wheels
BENCH := PYTHONPATH=$(SITE) $(PYTHON) -m bench
FLAGS = --device $(DEVICE) --out $(OUT) $(QUICK)

# pip where it can, else the folders where an installation would have them
gpu-setup:
	$(PYTHON) -c 'import kru_triton.kernels' 2>/dev/null \
	  || $(PYTHON) -m pip install -q --no-deps --no-build-isolation -e . \
	  || { ln -sfn ../kernels kru_triton/kernels && ln -sfn ../train kru_triton/train; }

GPU_TESTS := kernels conformance dispatch lstm

gpu-test: gpu-setup
	$(PYTHON) -m pytest -m gpu $(GPU_TESTS:%=tests/test_%.py) $(ARGS)

# every part runs, whatever another one's end; the table comes last
gpu: gpu-setup
	mkdir -p $(OUT)
	failed=; for part in $(PART); do $(MAKE) --no-print-directory gpu-part-$$part || failed="$$failed $$part"; done; \
	  $(BENCH) --table --device $(DEVICE) --out $(OUT); \
	  test -z "$$failed" || { echo "failed parts:$$failed"; exit 1; }

# files side by side: most of their time is the compiler's
gpu-part-1:
	$(MAKE) -k -j4 --output-sync --no-print-directory $(GPU_TESTS:%=gpu-file-%)

gpu-file-%:
	timeout -k 20 -s INT 550 $(PYTHON) -m pytest -m gpu tests/test_$*.py \
	  -q --junitxml $(OUT)/gpu-tests-$*.xml $(ARGS); code=$$?; test $$code = 5 || exit $$code

gpu-part-2:
	$(BENCH) kernels $(FLAGS) --minutes $(MINUTES) $(ARGS)

gpu-part-3:
	$(BENCH) tune $(FLAGS) --minutes $(MINUTES) $(ARGS)

gpu-part-4:
	$(BENCH) train_step $(FLAGS) --minutes $(MINUTES) $(ARGS)

gpu-part-5:
	$(BENCH) decode $(FLAGS) --minutes $(MINUTES) $(ARGS)

# without WHEELS a loop on torch alone; with it train/lm.py itself
LEARN ?= 1.75
gpu-part-6:
ifdef WHEELS
	$(PYTHON) -m pip install -q --no-index --no-deps --no-compile --upgrade --target $(SITE) $(WHEELS)/*.whl
	PYTHONPATH=$(SITE) $(PYTHON) -m kru_triton.train.lm --preset base --minutes 6 --run-dir build/gpu-run
	cp build/gpu-run/summary.json $(OUT)/gpu-train-summary.json
	cp build/gpu-run/metrics.jsonl $(OUT)/gpu-train-metrics.txt
else
	@echo "train/lm.py needs tyro, tqdm, safetensors, numpy and what they need: on a machine with a registry,"
	@echo "  pip download --no-deps --only-binary=:all: --python-version VERSION --platform manylinux2014_x86_64 -d FOLDER tyro docstring_parser typeguard typing_extensions tqdm safetensors"
	@echo "bring FOLDER along and say: make gpu PART=6 WHEELS=FOLDER"
	$(BENCH) learn $(FLAGS) --minutes-each $(LEARN) $(ARGS)
endif

lint: $(VENV)/.ok
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

bench: $(VENV)/.ok
	$(PY) -m bench $(or $(ARGS),--all)

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
