# make help        what there is
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: bench clean compare demo help lint test test-newest

PROMPT ?= Explain in two sentences why the sky is blue.
MODEL ?= HuggingFaceTB/SmolLM2-135M-Instruct
ARGS ?=
# Which tests run on the newest JAX, without torch: kernels, apart from the backends that are plain JAX and from what the
# other JAX has shown: every kind of layer, and programs for a second GPU.
NEWEST_TESTS ?= tests/pallas_kernels tests/test_donation.py tests/test_kernels_in_model.py \
	-k "not reference and not xla and not every_kind_of_layer and not ((machine_code or for_a_gpu) and a100)"

# Through the environment and unexpanded, so that quotes and dollars in a prompt survive both make and the shell.
export DSJAX_PROMPT := $(value PROMPT)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

VENV := .venv
NEWEST := .venv-newest
BIN := $(VENV)/bin
PIP_INSTALL := -m pip install -qq
# With -j two recipes would run pip in the same environment at the same time.
.NOTPARALLEL:

# The tests run on the CPU, and compile for GPUs with the plugin in $(1)/cuda. Two workers share the compilation cache,
# and torch takes one thread in each.
test_env = env JAX_PLATFORMS=$${JAX_PLATFORMS:-cpu} PYTHONPATH="$(CURDIR)/$(1)/cuda" OMP_NUM_THREADS=1 \
	JAX_COMPILATION_CACHE_DIR="$(CURDIR)/.jax_cache" JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.2
# A file stays with one worker: what its tests share is made and compiled once. Reordered, the long files come last.
PYTEST := -m pytest -n 2 --dist loadfile --no-loadscope-reorder --timeout 600

help:
	@echo 'make demo [PROMPT="..."] [MODEL=...] [ARGS="--max-tokens 64"]   ask a model a question'
	@echo 'make test [ARGS="-k pages"]   the whole suite'
	@echo 'make test-newest              kernels and lowering on the newest JAX (Python 3.12 or newer)'
	@echo 'make compare                  against llama.cpp (builds it first: minutes)'
	@echo 'make bench [ARGS="..."]       speed on this CPU, against transformers'
	@echo 'make lint                     ruff and pyright, as CI does'
	@echo 'make clean                    removes environments and caches'

demo: $(VENV)/.installed
	@$(BIN)/dsjax generate "$(MODEL)" -p "$$DSJAX_PROMPT" $(ARGS)

test: $(VENV)/.installed-test $(VENV)/.cuda
	$(call test_env,$(VENV)) $(BIN)/python $(PYTEST) $(ARGS)

compare: $(VENV)/.installed-compare
	$(call test_env,$(VENV)) $(BIN)/python -m pytest -m compare $(ARGS)

bench: $(VENV)/.installed-bench
	JAX_PLATFORMS=cpu $(BIN)/python -m bench.cpu_vs_transformers $(ARGS)

lint: $(VENV)/.installed-dev
	@status=0; \
	$(BIN)/ruff format --check . || status=1; \
	$(BIN)/ruff check . || status=1; \
	$(BIN)/pyright --pythonpath $(BIN)/python || status=1; \
	exit $$status

test-newest:
	@if sh .ci/find-python.sh 12 >/dev/null 2>&1; then \
		$(MAKE) --no-print-directory $(NEWEST)/.cuda && \
		$(call test_env,$(NEWEST)) $(NEWEST)/bin/python $(PYTEST) $(NEWEST_TESTS) $(ARGS); \
	else \
		echo 'test-newest: the newest JAX needs Python 3.12 or newer, and there is none here: nothing was run'; \
	fi

clean:
	rm -rf $(VENV) $(NEWEST) .jax_cache .pytest_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.installed: pyproject.toml
	@python="$$(sh .ci/find-python.sh 11)" || exit 1; \
	echo "Installing into $(VENV) with $$python (once; about a minute)"; \
	"$$python" -m venv $(VENV)
	@$(BIN)/python $(PIP_INSTALL) --editable .
	@touch $@

$(VENV)/.installed-%: $(VENV)/.installed
	@echo "Installing what '$*' needs (once)"
	@$(BIN)/python $(PIP_INSTALL) --editable '.[$*]'
	@touch $@

$(VENV)/.installed-compare: $(VENV)/.installed-test
	@echo "Building llama.cpp (once; minutes)"
	@$(BIN)/python $(PIP_INSTALL) --editable '.[compare]'
	@touch $@

$(NEWEST)/.installed: pyproject.toml
	@python="$$(sh .ci/find-python.sh 12)" || exit 1; \
	echo "Installing the newest JAX into $(NEWEST) with $$python (once; about a minute)"; \
	"$$python" -m venv $(NEWEST)
	@$(NEWEST)/bin/python $(PIP_INSTALL) --upgrade jax --editable '.[test-minimal]'
	@touch $@

$(VENV)/.cuda: $(VENV)/.installed
$(NEWEST)/.cuda: $(NEWEST)/.installed
%/.cuda: .ci/cuda-compile-only.sh
	@echo "Installing what it takes to compile for a GPU without one (once)"
	@sh .ci/cuda-compile-only.sh $*/bin/python $*/cuda
	@touch $@
