PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
JOBS ?= 2
COUNT ?= 100000
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# Python is used where it lies; only what is compiled, or the list of dependencies, needs installing again.
$(INSTALLED): pyproject.toml CMakeLists.txt $(wildcard csrc/*) $(wildcard csrc/*/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $@

.PHONY: demo test test-slow sanitize fuzz fuzz-training faults lint bench clean

demo: $(INSTALLED)  ## train a VAE on real images and leave pictures of what it learned
	$(BIN)/genfuse train vae --data digits --out runs/demo --epochs 200 --model.latent-dim 10 --model.decoder discretized-logistic --overwrite
	$(BIN)/genfuse evaluate runs/demo
	$(BIN)/genfuse sample runs/demo --n 64 --out runs/demo/samples.png --overwrite

test: $(INSTALLED)  ## every test that takes seconds
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n $(JOBS) --dist loadfile

test-slow: $(INSTALLED)  ## the tests that take minutes
	$(BIN)/python -m pytest -m slow

fuzz: $(INSTALLED)  ## COUNT damaged and made-up inputs for each thing that reads files
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz --count $(COUNT)

faults: $(INSTALLED)  ## kills, full disks, flipped bits, two writers: prints the table of docs/reliability.md
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults

fuzz-training: $(INSTALLED)  ## 1,000 short trainings under settings and data that go wrong in practice
	$(BIN)/python tests/fuzz_training.py --trainings 1000

sanitize: $(INSTALLED)  ## every kernel under sanitizers, those of CUDA on the emulator, and the fuzz
	$(BIN)/python tests/cuda_emulator/sanitize.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(wildcard csrc/*.* csrc/*/*.* $(addprefix tests/cuda_emulator/,*.cpp *.cu include/*))

bench: $(INSTALLED)  ## measure everything, and write docs/benchmarks.md from it
	$(BIN)/python -m benchmarks ops --json build/ops.json
	$(BIN)/python -m benchmarks training --quality --json build/training.json
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[peers]"
	$(BIN)/python -m benchmarks flows --quality --json build/flows.json
	$(BIN)/python -m benchmarks gans --quality --json build/gans.json
	$(BIN)/python -m benchmarks examples --json build/examples.json
	$(BIN)/python -m benchmarks report build/ops.json build/training.json build/flows.json build/gans.json build/examples.json --out docs/benchmarks.md

clean:
	rm -rf $(VENV) build dist
