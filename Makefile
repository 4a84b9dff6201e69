PYTHON ?= python3
TORCH ?= torch==2.13.0
# One for each PyTorch and Python that are asked for: what is installed already would be taken for them.
VENV ?= .venv$(if $(filter-out file,$(origin TORCH) $(origin PYTHON)),-$(subst /,-,$(PYTHON))-$(subst ==,-,$(TORCH)))
JOBS ?= 2
COUNT ?= 100000
TESTS ?= tests
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# For the demo: what the package needs and no more, beside the torch that is there, if there is one. Kernels, for this
# machine alone, are compiled while the rest is fetched.
RUNS := $(VENV)/.runs
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Where torch is, and whether it is for CUDA: found, not imported, which takes seconds each time.
WHERE := import importlib.util as u, os, runpy; torch = os.path.dirname(u.find_spec('torch').origin)
$(RUNS): pyproject.toml CMakeLists.txt $(wildcard csrc/*) $(wildcard csrc/*/*)
	@test -e $(INSTALLED) || echo "installing genfuse into $(VENV), which takes a minute or so: fetches packages, and compiles kernels meanwhile"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c "$(WHERE)" 2>/dev/null || $(PYTHON) -c "$(WHERE); print(os.path.dirname(torch))" \
		> $$($(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/torch-of-python.pth 2>/dev/null || true
	@$(BIN)/python -c "$(WHERE)" 2>/dev/null || $(PIP) install "$(TORCH)"
	@sed -n '/^dependencies = \[/,/^\]/s/^  "\(.*\)",.*/\1/p' pyproject.toml > $(VENV)/needed.txt
	@test -e $(INSTALLED) || { \
		cuda=$$($(BIN)/python -c "$(WHERE); print('AUTO' if runpy.run_path(torch + '/version.py')['cuda'] else 'OFF')"); \
		rm -rf $(VENV)/wheel; GENFUSE_CUDA=$$cuda GENFUSE_SIMD=THIS $(PIP) wheel --quiet --no-deps --wheel-dir $(VENV)/wheel . & kernels=$$!; \
		$(PIP) install --no-compile --requirement $(VENV)/needed.txt && echo "compiling the rest of the kernels" && \
		wait $$kernels && $(PIP) install --quiet --no-deps --force-reinstall $(VENV)/wheel/genfuse-*.whl; }
	@touch $@

# Python is used where it lies; only what is compiled, or the list of dependencies, needs installing again.
$(INSTALLED): pyproject.toml CMakeLists.txt $(wildcard csrc/*) $(wildcard csrc/*/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $@

.PHONY: demo test test-slow sanitize fuzz fuzz-training faults lint names docs bench clean

DEMO_DATA ?= $(if $(wildcard $(GENFUSE_DATA)/mnist),mnist,glyphs)

demo: $(RUNS)  ## train a VAE, on MNIST if it is there, and leave pictures of what it learned; minutes, no GPU needed
	$(BIN)/genfuse train vae --data $(DEMO_DATA) --data.binarize dynamic --out runs/demo --steps 3000 --model.conditional --model.latent-dim 10 --overwrite
	$(BIN)/genfuse evaluate runs/demo --limit 500 --n 500
	$(BIN)/genfuse sample runs/demo --n 100 --out runs/demo/samples.png --overwrite
	@echo && echo "Look at runs/demo/pictures: samples.png, traversal.png, reconstructions.png, latent.png"

# Threads that wait sleep, as other tests run beside them; sources are compiled once for the many processes.
test: $(INSTALLED)  ## every test that takes seconds, or those of TESTS="tests/ops tests/nn"
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest $(TESTS) -m "not slow" -n $(JOBS) --dist worksteal

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
	$(BIN)/clang-format --dry-run --Werror $(wildcard csrc/*.* csrc/*/*.* tests/ops/*.cpp $(addprefix tests/cuda_emulator/,*.cpp *.cu include/*))

names: $(INSTALLED)  ## add new public names to the list that the tests hold; what is gone stays on it
	$(BIN)/python tests/test_public_names.py

# The site needs no PyTorch: it reads the sources.
SITE := $(VENV)/site
$(SITE)/.installed: pyproject.toml
	test -x $(SITE)/bin/python || $(PYTHON) -m venv $(SITE)
	$(SITE)/bin/python -m pip install --quiet --disable-pip-version-check "pip>=25.1"  # which knows groups
	$(SITE)/bin/python -m pip install --quiet --disable-pip-version-check --group docs
	touch $@

docs: $(SITE)/.installed  ## the site, into build/site; fails on a warning, such as a link that leads nowhere
	NO_MKDOCS_2_WARNING=1 $(SITE)/bin/mkdocs build --strict

bench: $(INSTALLED)  ## measure everything, and write docs/benchmarks.md from it
	$(BIN)/python -m benchmarks ops --json build/ops.json
	$(BIN)/python -m benchmarks training --quality --json build/training.json
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[peers]"
	$(BIN)/python -m benchmarks steps --compile --profile --json build/steps.json --chart docs/steps.svg
	$(BIN)/python -m benchmarks flows --quality --json build/flows.json
	$(BIN)/python -m benchmarks gans --quality --json build/gans.json
	$(BIN)/python -m benchmarks examples --json build/examples.json
	$(BIN)/python -m benchmarks report build/steps.json build/ops.json build/training.json build/flows.json build/gans.json build/examples.json --out docs/benchmarks.md

clean:
	rm -rf $(VENV) build dist
