# Every target sets up what it needs: a fresh machine with Python 3.11 and make is enough.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check

.PHONY: install serve test test-slow test-multi test-hosts test-load test-parity test-aot test-gpu test-tpu lint format clean

install: .venv/.installed

serve: install
	$(BIN)/python -m lamina_jax.serve $(ARGS)

# Most of its time is compiling: LLVM does without its optimisations here, and takes a third less. The other
# targets test what users run.
test: install
	XLA_FLAGS="--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true $$XLA_FLAGS" \
	    $(BIN)/python -m pytest -q $(ARGS)

test-slow: install
	$(BIN)/python -m pytest -q -m slow $(ARGS)

# Starts processes of its own; some tests need to be root.
test-multi: install
	$(BIN)/python -m pytest -q -m "multi and not slow and not load" $(ARGS)

# Several compute hosts, prefill hosts and launchers, as processes of this machine.
test-hosts: install
	$(BIN)/python -m pytest -q -m hosts $(ARGS)

# Load, soak, long fuzzing, client libraries: tests that litellm and langchain-openai are missing for are skipped.
test-load: install
	$(BIN)/python -m pytest -q -m load $(ARGS)

# Makes the reference fixtures anew with torch and transformers, then compares with them.
test-parity: .venv-parity/.installed
	.venv-parity/bin/python tests/parity/make_fixtures.py
	.venv-parity/bin/python -m pytest -q -m "" tests/parity $(ARGS)

# Compiles for TPUs and GPUs, with none at hand. `.venv-aot/bin/python -m lamina_jax.bench aot` prints the table.
test-aot: .venv-aot/.installed
	.venv-aot/bin/python -m pytest -q -m aot $(ARGS)

# On the machine that has the device: checks the kernels, times them, and writes hardware-gpu.json. Where its
# Python has JAX, pytest and hypothesis already: make test-gpu DEVICE_PYTHON=python3 (docs/hardware.md).
test-gpu: $(if $(DEVICE_PYTHON),,.venv-gpu/.installed)
	$(or $(DEVICE_PYTHON),.venv-gpu/bin/python) tests/hardware/check.py gpu $(ARGS)

test-tpu: $(if $(DEVICE_PYTHON),,.venv-tpu/.installed)
	$(or $(DEVICE_PYTHON),.venv-tpu/bin/python) tests/hardware/check.py tpu $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-parity .venv-aot .venv-gpu .venv-tpu build dist *.egg-info .pytest_cache .mypy_cache \
	    .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.installed: EXTRAS := test
.venv-parity/.installed: EXTRAS := test,parity
.venv-aot/.installed: EXTRAS := test,aot
.venv-gpu/.installed: EXTRAS := test,cuda
.venv-tpu/.installed: EXTRAS := test,tpu

.venv/.installed .venv-parity/.installed .venv-aot/.installed .venv-gpu/.installed .venv-tpu/.installed: \
    pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo 'Python 3.11 or newer is needed: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11'; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || $(VENV_MODULE)
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python $(PIP_INSTALL) -c constraints.txt -e '.[$(EXTRAS)]'
	@$(@D)/bin/python -m lamina_jax.cpu_kernels
	@touch $@

# Debian packs Python's venv module apart: as root it is installed, else the command is named.
VENV_MODULE = { \
    [ "$$(id -u)" = 0 ] && apt-get -qq update && apt-get -qq install -y python3-venv; \
} || { echo "Python's venv module is missing: apt-get install python3-venv"; exit 1; }
