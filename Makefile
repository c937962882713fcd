# `make` lists the targets. PYTHONSAFEPATH keeps the repo root off sys.path: its folder kernels/ would shadow a package
# of that name which transformers imports.
export PYTHONSAFEPATH := 1
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
PYTHON ?= python3
VENV ?= .venv
# The CPU build of torch. On a machine whose package index serves CUDA builds only, name PyTorch's CPU index:
#   make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
# What is installed beside torch; client,test leaves a torch that is there as it is (a Jetson; docs/jetson.md).
EXTRAS ?= dev
BIN := $(VENV)/bin
ROOMS := profiles protocol kernels edge_client aggregator fedblocks tests benchmarks

.PHONY: help setup demo test test-slow test-gpu fuzz check format lint types imports docs wheel clean
.PHONY: bench-runtime bench-memory bench-7b bench-gpu bench-fleet bench-traffic bench-aggregator bench-fedhft experiments experiments-gpu test-kernels packs budgets
.PHONY: peers bench-peers test-flower

help:  ## list the targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(BIN)/.ready: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools
	$(BIN)/python -c "import torch" 2>/dev/null || \
	  $(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[$(EXTRAS)]"
	touch $@

setup: $(BIN)/.ready  ## make .venv with a pinned torch and everything that demo and tests need

demo: setup  ## federate the bundled model over one aggregator and four clients; result in runs/demo
	$(BIN)/fedblocks demo --json runs/demo/result.json

test: setup  ## the test suite (under 10 minutes on 2 cores)
	$(BIN)/pytest -n 2 --dist loadfile -m "not slow and not gpu"

test-slow: setup  ## the tests that take longer than ten seconds each
	$(BIN)/pytest -m "slow and not gpu"

test-gpu: setup  ## the tests that need a CUDA device
	$(BIN)/pytest -m gpu

# The benchmarks import each other; PYTHONSAFEPATH keeps their folder off the path as well.
BENCH := PYTHONPATH=benchmarks $(BIN)/python

bench-runtime: setup  ## CPU time and memory of a training step against the usual stacks (about an hour; 22 GB of memory)
	$(BENCH) benchmarks/bench_runtime.py

bench-memory: setup  ## predicted against measured peak memory of the client's modes
	$(BENCH) benchmarks/bench_memory.py

bench-7b: setup  ## one block of a 7B shape: peak memory, time per token (25 GB of free disk)
	$(BENCH) benchmarks/bench_7b.py

bench-gpu: setup  ## kernels and training steps on this machine's GPU, against its limits and other stacks (8 minutes)
	$(BENCH) benchmarks/bench_gpu.py

bench-fleet: setup  ## plans of random fleets: limits, distance from the best plan, time (15 minutes)
	$(BENCH) benchmarks/bench_fleet.py

experiments-gpu: setup  ## the same on this machine's GPU, into results of its own
	$(BENCH) benchmarks/experiments.py --device cuda

experiments: setup  ## methods beside each other on the starter model, 3 hours a task; goes on where it stopped
	$(BENCH) benchmarks/experiments.py
	$(BENCH) benchmarks/methods_document.py

bench-fedhft: setup  ## FedHFT, LoRA and full fine-tuning of MiniLM over unequal clients (3 hours; needs the model's package)
	$(BENCH) benchmarks/fedhft_minilm.py
	$(BENCH) benchmarks/fedhft_minilm.py --summary
	$(BENCH) benchmarks/fedhft_document.py

bench-traffic: setup  ## bytes at the socket for updates of the Qwen2.5-0.5B shape (30 minutes)
	$(BENCH) benchmarks/traffic.py

bench-aggregator: setup  ## rounds beside the bare wire, memory by clients, 1,000 clients, 10,000 rounds (an hour)
	$(BENCH) benchmarks/bench_aggregator.py

# Flower and NVFlare pin older libraries than ours, so each stands in an environment of its own.
PEERS := .peers
$(PEERS)/flwr/.ready:
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --upgrade pip setuptools
	$(@D)/bin/python -m pip install --quiet "flwr==1.41.0"
	touch $@

$(PEERS)/nvflare/.ready:
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --upgrade pip setuptools
	$(@D)/bin/python -m pip install --quiet "nvflare==2.9.0"
	touch $@

peers: $(PEERS)/flwr/.ready $(PEERS)/nvflare/.ready  ## make .peers/flwr and .peers/nvflare, environments of their own (550 MB)

# What the adapter is tested with stands beside Flower: torch, and this checkout.
$(PEERS)/flwr/.with-fedblocks: $(PEERS)/flwr/.ready pyproject.toml
	$(@D)/bin/python -c "import torch" 2>/dev/null || \
	  $(@D)/bin/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	$(@D)/bin/python -m pip install --quiet --no-build-isolation --editable ".[client,flower]"
	touch $@

test-flower: setup $(PEERS)/flwr/.with-fedblocks  ## one federation through ZeroMQ and through Flower, and kills (15 minutes, 1.4 GB; docs/flower.md)
	$(BIN)/pytest tests/system/test_flower.py

bench-peers: setup peers  ## a round, bad updates and crashes beside Flower and NVFlare (an hour; docs/peers.md)
	$(BENCH) benchmarks/bench_peers.py
	$(BENCH) benchmarks/peers_document.py

test-kernels: setup  ## all tests of kernels/, with the matrix of all compiled forms (10 minutes)
	$(BIN)/pytest -m "not gpu" tests/kernels

FUZZ_CASES ?= 2000000
fuzz: setup  ## two million hostile inputs for the decoders (5 minutes); guided by coverage where atheris is installed (EXTRAS=dev,fuzz)
	$(BIN)/python tests/fuzz/decoders.py --cases $(FUZZ_CASES) \
	  $(shell $(BIN)/python -c "import atheris; print('--atheris')" 2>/dev/null)

check: format lint types imports test  ## format, lint, types, imports and tests

format: setup  ## check the format (ruff)
	$(BIN)/ruff format --check $(ROOMS)

lint: setup  ## lint (ruff)
	$(BIN)/ruff check $(ROOMS)

# The type checker and the import linter do not follow the editable mapping of the rooms: both read a copy. The checker
# skips every path that has a dot folder below its project's root, so the copy is the root, with a config of its own.
.PHONY: copies
copies:
	rm -rf .typing && mkdir -p .typing
	cp -r fedblocks .typing/
	cp -r profiles protocol kernels edge_client aggregator .typing/fedblocks/
	cp pyproject.toml .typing/

types: setup copies  ## strict types of profiles, protocol and aggregator (basedpyright)
	$(BIN)/basedpyright -p .typing --pythonpath $(abspath $(BIN))/python

imports: setup copies  ## the import contracts between the rooms (import-linter)
	cd .typing && $(abspath $(BIN))/lint-imports --no-cache --config pyproject.toml

docs: setup  ## write docs/cli.md from the help texts
	$(BIN)/python docs/write_cli.py

# The two versions of ptxas that make packs, each in a folder of its own: they carry the same file names.
PACKTOOLS := .packtools
$(PACKTOOLS)/%/.ready: | $(BIN)/.ready
	rm -rf $(@D)
	$(BIN)/python -m pip install --quiet --no-deps --target $(@D) "nvidia-cuda-nvcc-cu12==$*"
	touch $@

packs: setup $(PACKTOOLS)/12.6.85/.ready $(PACKTOOLS)/12.9.86/.ready  ## compile kernels/packs/*.pack (triton 3.7.1)
	$(BIN)/python -m fedblocks.kernels.build_packs packs --tools $(PACKTOOLS)

budgets: setup  ## compile every kernel for every GPU; what each takes goes to kernels/budgets.json
	$(BIN)/python -m fedblocks.kernels.build_packs budgets

wheel: setup  ## build the wheel into dist/
	$(BIN)/python -m build --wheel --no-isolation --outdir dist .

clean:  ## remove what the targets made
	rm -rf build dist .typing .venv runs *.egg-info
