# make train   set up, then train the default language model and print its bits per byte
# make test    set up, then run every test
# Both need only Python 3.11 or newer, make and a package registry.
.PHONY: train test gpu-test lint bench clean

VENV ?= .venv
PYTHON ?= python3
PY := $(VENV)/bin/python
RUN_DIR ?= runs/lm

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
	$(PY) -m pytest -n 2 --dist loadgroup $(ARGS)

# on a GPU machine, with its own python: needs torch, triton, numpy and pytest alone
gpu-test:
	$(PYTHON) -m pip install -q --no-deps --no-build-isolation -e .
	$(PYTHON) -m pytest -m gpu tests/test_kernels.py tests/test_kernels_lstm.py tests/test_dispatch.py $(ARGS)

lint: $(VENV)/.ok
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

bench: $(VENV)/.ok
	$(PY) bench/cpu.py $(ARGS)

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
