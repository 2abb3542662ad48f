# Everything a user or CI calls. `make quickstart` on a fresh machine is the place to start.
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
PIP := -m pip install --disable-pip-version-check
# The newest versions that were run, unless the environment has its own reasons: make CONSTRAINTS=other.txt
CONSTRAINTS ?= constraints.txt
# Time of `make demo`; parts that do not fit are left out, and named.
MINUTES ?= 30
# Prebuilt llama.cpp v0.4.0 for node: no compiler, 83 MB. Its optional packages are 650 MB of CUDA and Vulkan.
ENGINES := node-llama-cpp@3.21.1 @node-llama-cpp/linux-x64@3.21.1
OLDEST := tests/rope tests/attention tests/lm_infinite tests/engine tests/test_api.py tests/checkpoint/test_store.py \
	tests/models/test_official.py tests/preflight/test_activations.py tests/preflight/test_model_states.py tests/tracking/test_tracker.py \
	tests/training/test_ode_optimizer.py tests/utils/test_private_names.py tests/report tests/export tests/inspection tests/model_config \
	tests/data_prep/test_damaged_files.py tests/data_prep/test_readers.py tests/data_prep/chat tests/adapters tests/generation

# The mathematics, and rooms whose tests run in this process. Left to `make test`: every model family (test_rotary_families,
# test_lm_infinite_models), and what composes configurations with Hydra (test_config, test_bounds).
FAST := tests/scaling tests/attention tests/data tests/utils tests/helpers tests/docs/test_site.py \
	tests/lm_infinite/test_lambda_attention.py tests/lm_infinite/test_cache.py \
	tests/lm_infinite/test_middle_tokens.py tests/rope/test_install_rotary.py tests/rope/test_key_cache.py \
	tests/model_config/test_config_checks.py tests/rope/test_hf_scalings.py tests/rope/test_rotary_gradients.py \
	tests/models/test_official.py tests/models/test_official_field.py

.PHONY: quickstart smoke demo demo-smoke test test-fast test-oldest test-slow test-gpu test-slurm test-engines test-eval check docs dockerfile format environment clean

quickstart: environment  ## the whole main job on the standard library's sources, about 15 minutes on 2 cores
	$(BIN)/python -m launch.quickstart

smoke: environment  ## the same with few steps, about two minutes
	$(BIN)/python -m launch.quickstart --smoke

demo: .venv/export  ## a real pretrained model extended and exported, 30 minutes on 2 cores; MINUTES=90 adds 32k
	$(BIN)/python -m launch.demo --minutes $(MINUTES)

demo-smoke: .venv/export  ## the same stages with tiny numbers, in a few minutes
	$(BIN)/python -m launch.demo --smoke --minutes $(MINUTES)

test: .venv/dev  ## the suite without the markers slow, gpu, slurm and engine, on two cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=20 -rs

test-fast: .venv/dev  ## mathematics, RoPE, attention, LM-Infinite, data: under two minutes on two cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -rs $(FAST)

test-oldest: .venv-oldest/dev  ## what depends most on transformers and DeepSpeed, on the oldest versions allowed
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -n 2 --dist loadfile $(OLDEST)

test-slow: .venv/dev
	$(BIN)/python -m pytest -m slow

test-gpu: .venv/dev
	$(BIN)/python -m pytest -m gpu

test-slurm: .venv/dev  ## on a real SLURM of two nodes, started here from Debian's packages; skipped without them
	$(BIN)/python -m pytest -m slurm -rs tests/slurm

test-engines: .venv/dev .engines/installed  ## GGUF files in llama.cpp, by its prebuilt npm package; needs node and npm
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m engine -rs

test-eval: .venv/eval  ## benchmarks against lm-eval itself, which `make test` skips
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -rs tests/harness

check: .venv/dev dockerfile docs  ## lint, format, types, direction of imports, Dockerfile, documentation
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: .venv/dev  ## the site in site/; a broken link or an undocumented page is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

dockerfile: .venv/dev  ## by docker's own checks where a daemon runs, else by hadolint
	@if docker buildx version >/dev/null 2>&1 && docker info >/dev/null 2>&1; then docker build --check .; \
	elif [ -x $(BIN)/hadolint ]; then $(BIN)/hadolint Dockerfile; \
	else echo "Dockerfile: no docker daemon here, and no hadolint for this processor; only the test reads it"; fi

format: .venv/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

environment: .venv/run

.venv/bin/python:
	@launch/prerequisites.sh $(PYTHON)
	$(PYTHON) -m venv .venv

.venv/run: requirements.txt $(CONSTRAINTS) .venv/bin/python
	$(BIN)/python $(PIP) --progress-bar on -r requirements.txt -c $(CONSTRAINTS)
	@touch $@

.venv/export: requirements-export.txt .venv/run
	$(BIN)/python $(PIP) -q -r requirements-export.txt -c $(CONSTRAINTS)
	@touch $@

.venv/eval: requirements-eval.txt .venv/dev
	$(BIN)/python $(PIP) -q -r requirements-eval.txt -c $(CONSTRAINTS)
	@touch $@

.engines/installed: Makefile
	@command -v npm >/dev/null || { echo "error: make test-engines needs node and npm; apt-get install npm"; exit 1; }
	@mkdir -p .engines
	npm install --prefix .engines --no-audit --no-fund --ignore-scripts --omit=optional $(ENGINES)
	@touch $@

.venv/dev: requirements-dev.txt requirements-adapters.txt requirements-docs.txt requirements-export.txt .venv/run
	$(BIN)/python $(PIP) -q -r requirements-dev.txt -r requirements-docs.txt -c $(CONSTRAINTS)
	@touch $@

.venv-oldest/dev: requirements-dev.txt requirements-adapters.txt requirements-export.txt requirements.txt constraints-oldest.txt
	@launch/prerequisites.sh $(PYTHON)
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python $(PIP) -q -r requirements-dev.txt -c constraints-oldest.txt
	@touch $@

clean:  ## what the quick start and the demo made, not the environment
	rm -rf runs corpora
