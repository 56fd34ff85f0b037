# Every target works from a fresh clone: those that need the environment make it first.
# Variables: PYTHON (a Python 3.11), TORCH_PIP_ARGS (such as an index with CPU wheels of torch), PYTEST_ARGS,
# TEST_PROCESSES (of make test: 2, or 1 to name tests in PYTEST_ARGS),
# LOCK_ARGS (--upgrade takes newer versions; without it the locked ones stay where they still fit),
# PYTHON312 (a Python 3.12, for test-te and test-image),
# TE_EXTENSION (for these two: a wheel of transformer-engine-torch; test-te compiles it otherwise),
# MUTANTS_ARGS (what `python -m tests.mutants --help` lists),
# GPU_PYTHON (the Python of a machine with a GPU) and GPU_CHECK_ARGS, for gpu-check.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON ?= python3.11
TORCH_PIP_ARGS ?=
PYTEST_ARGS ?=
TEST_PROCESSES ?= 2
MUTANTS_ARGS ?=
GPU_PYTHON ?= python3
GPU_CHECK_ARGS ?=
LOCK_ARGS ?=
PYTHON312 ?= python3.12
TE_EXTENSION ?= -r requirements/te-extension.txt

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check
UV := $(BIN)/uv --system-certs
LOG := $(VENV)/setup.log
BOOTSTRAPPED := $(VENV)/.bootstrapped
INSTALLED := $(VENV)/.installed
INTEROP := .venv-interop
TRANSFORMERS5 := .venv-transformers5
TE := .venv-te
IMAGE := .venv-image
IMAGE_TOOLS := .venv-image-tools
SBOM := build/sbom.cdx.json
LAUNCH := .venv-launch
# Half of the time. Tests of exchanges fork, so nothing before them in their process may join a process group.
ENGINE := tests/engine tests/ops tests/layouts tests/export tests/compatibility
TE_CUDA := $(CURDIR)/$(TE)/lib/python3.12/site-packages/nvidia
LOCKS := requirements/bootstrap.lock requirements/cpu.lock requirements/gpu-py312.lock requirements/interop.lock \
	requirements/te.lock requirements/image.lock requirements/image-tools.lock requirements/launch.lock \
	requirements/transformers5.lock

# What runs inside the environment must not see another one.
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV
# With a CUDA build of torch and no GPU, megatron.core cannot be imported unless this is set; it has no other effect here.
export TORCH_CUDA_ARCH_LIST ?= 9.0

.PHONY: help setup demo test test-layouts test-launch test-chaos test-recipe test-interop test-te test-image mutants gpu-check lint lint-image sbom format lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(INSTALLED) ## make .venv from the lock; does nothing when it is up to date

demo: setup ## run the whole recipe in miniature, from text to report (about 10 minutes on two cores)
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash scripts/demo.sh

test: setup lint ## check imports, style and types, then run every test that needs no GPU
	@pytest=("$(BIN)/python" -m pytest -m "not gpu and not layouts and not recipe and not launch" $(PYTEST_ARGS)); \
	if [[ $(TEST_PROCESSES) == 1 ]]; then echo "tests: pytest"; exec "$${pytest[@]}"; fi; \
	echo "tests: pytest, $(ENGINE) and the others at the same time"; \
	"$${pytest[@]}" $(ENGINE) > $(VENV)/test-engine.log 2>&1 & engine=$$!; \
	trap 'kill $$engine 2> /dev/null || true' EXIT; \
	status=0; "$${pytest[@]}" $(ENGINE:%=--ignore=%) || status=$$?; \
	wait $$engine || status=$$?; \
	echo "$(ENGINE):"; cat $(VENV)/test-engine.log; exit $$status

test-layouts: setup ## compare every (TP, PP, CP, DP) layout on 2 and 4 ranks with one rank (about 10 minutes)
	@$(BIN)/python -m pytest tests/layouts $(PYTEST_ARGS)

test-launch: $(LAUNCH)/.installed setup ## train on two nodes that are emulated, under every launcher; check job files and manifests (about 5 minutes)
	@files=$$(mktemp -d); trap 'rm -rf "$$files"' EXIT; \
	$(BIN)/python -m tests.launch.write_files "$$files"; \
	LAUNCH_FILES=$$files $(LAUNCH)/bin/python -m pytest -c tests/launch/tools.ini tests/launch/tools_files.py $(PYTEST_ARGS)
	@$(BIN)/python -m pytest -m launch tests/launch $(PYTEST_ARGS)

test-chaos: setup ## kill a run in its save path and at 50 random times, and compare every bit (PROLONG_RANDOM_KILLS=N for more)
	@PROLONG_RANDOM_KILLS=$${PROLONG_RANDOM_KILLS:-50} $(BIN)/python -m pytest tests/engine/test_checkpoint_kills.py $(PYTEST_ARGS)

test-recipe: setup ## kill the tiny recipe at random times, and resume on 1, 2 and 4 ranks; compare every bit (about 7 minutes)
	@$(BIN)/python -m pytest -m recipe tests/stages tests/engine $(PYTEST_ARGS)

test-interop: $(INTEROP)/.installed $(TRANSFORMERS5)/.installed setup ## MDS against mosaicml-streaming; exports in transformers 4 and 5, served, in FP8
	@$(INTEROP)/bin/python -m pytest -c tests/interop/pytest.ini tests/interop/interop_mds.py $(PYTEST_ARGS)
	@exports=$$(mktemp -d); trap 'rm -rf "$$exports"' EXIT; \
	$(BIN)/python -m tests.interop.write_exports "$$exports" > "$$exports/log" 2>&1 || { cat "$$exports/log"; exit 1; }; \
	INTEROP_EXPORTS=$$exports $(TRANSFORMERS5)/bin/python -m pytest -c tests/interop/pytest.ini \
		tests/interop/interop_transformers.py tests/interop/interop_serving.py $(PYTEST_ARGS)

test-te: $(TE)/.installed ## build full-size Transformer Engine models without a GPU, in an environment of its own (6 GB)
	@CUDA_HOME=$(TE_CUDA)/cu13 $(TE)/bin/python -m pytest -c tests/te/pytest.ini tests/te $(PYTEST_ARGS)

# A mount namespace is made, which takes root. The layers stay, and the next run takes the stand-in of the base from them.
test-image: lint-image setup ## run the steps of the Dockerfile over a stand-in of its base, as root (12 GB, about 10 minutes)
	@$(FIND_PYTHON312) \
	if [[ ! -f "$(TE_EXTENSION)" ]]; then \
		echo "error: the stand-in of the base needs a wheel of transformer-engine-torch, TE_EXTENSION=FILE.whl." >&2; \
		echo "After make test-te: $(TE)/bin/python -m pip wheel --no-deps --no-build-isolation -r requirements/te-extension.txt" >&2; exit 1; fi; \
	$(BIN)/python -m tests.image --folder $(IMAGE) --python "$$("$$python" -c "import sys; print(sys.executable)")" \
		--te-extension="$(TE_EXTENSION)"

mutants: setup ## change the code in small ways, one at a time, and list the changes that no test notices (an hour)
	@nice $(BIN)/python -m tests.mutants $(MUTANTS_ARGS)

gpu-check: ## run the stages of benchmarks/hopper on the GPU of this machine, and write docs/verification/hopper.md
	@PYTHONPATH="$(PYTHONPATH)" $(GPU_PYTHON) -m benchmarks.hopper $(GPU_CHECK_ARGS)

lint: setup ## check import direction, style, formatting, types and YAML
	@echo "lint: import-linter, ruff, mypy, yamllint"
	@$(BIN)/lint-imports --no-logo > $(VENV)/lint-imports.log || { cat $(VENV)/lint-imports.log; exit 1; }
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check .
	@$(BIN)/mypy --no-error-summary
	@$(BIN)/yamllint --strict .

lint-image: $(IMAGE_TOOLS)/.installed ## check the Dockerfile with hadolint and the scripts of the image with shellcheck
	@echo "lint-image: hadolint, shellcheck"
	@$(IMAGE_TOOLS)/bin/hadolint Dockerfile
	@$(IMAGE_TOOLS)/bin/shellcheck docker/entrypoint.sh docker/torchrun

sbom: $(IMAGE_TOOLS)/.installed ## write build/sbom.cdx.json, what the image installs with every hash (CycloneDX 1.6, validated)
	@mkdir -p $(dir $(SBOM))
	@cat requirements/gpu-py312.lock requirements/image.lock | PYTHONWARNINGS=ignore $(IMAGE_TOOLS)/bin/cyclonedx-py requirements \
		--pyproject pyproject.toml --output-reproducible --sv 1.6 --validate -o $(SBOM) -
	@echo "sbom: $(SBOM)"

format: setup ## rewrite the sources in the project's format
	@$(BIN)/ruff check --quiet --fix . || true
	@$(BIN)/ruff format --quiet .

# The locks constrain each other, so that both platforms run the same versions.
COMPILE := $(UV) pip compile --quiet --generate-hashes --custom-compile-command "make lock" $(LOCK_ARGS)
lock: $(BOOTSTRAPPED) ## resolve the dependencies again and write requirements/*.lock
	@echo "lock: $(LOCKS)"
	@$(COMPILE) requirements/bootstrap.in --python-version 3.11 -o requirements/bootstrap.lock
	@$(COMPILE) pyproject.toml --extra dev requirements/cpu.in --python-version 3.11 \
		--override requirements/overrides.txt --constraint requirements/constraints.txt -o requirements/cpu.lock
	@$(COMPILE) pyproject.toml --extra test requirements/gpu-py312.in --python-version 3.12 \
		--override requirements/overrides.txt --constraint requirements/constraints.txt \
		--constraint requirements/cpu.lock -o requirements/gpu-py312.lock
	@$(COMPILE) requirements/interop.in --python-version 3.11 \
		--override requirements/interop.overrides.txt -o requirements/interop.lock
	@$(COMPILE) requirements/transformers5.in --python-version 3.11 \
		--override requirements/transformers5.overrides.txt -o requirements/transformers5.lock
	@$(COMPILE) requirements/launch.in --python-version 3.11 -o requirements/launch.lock
	@$(COMPILE) requirements/te.in --python-version 3.12 --constraint requirements/gpu-py312.lock \
		--override requirements/te.overrides.txt -o requirements/te.lock
	@$(COMPILE) requirements/image.in --python-version 3.12 --no-deps -o requirements/image.lock
	@$(COMPILE) requirements/image-tools.in --python-version 3.11 -o requirements/image-tools.lock

clean: ## delete every environment and every cache; runs/ and data/ stay
	@rm -rf $(VENV) $(INTEROP) $(TRANSFORMERS5) $(TE) $(IMAGE) $(IMAGE_TOOLS) $(LAUNCH) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A Python of the right version, then the installer: uv installs the lock four times as fast as pip.
$(BOOTSTRAPPED): requirements/bootstrap.lock
	@python=; for candidate in $(PYTHON) python3.11 python3; do \
		if "$$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2> /dev/null; \
		then python=$$candidate; break; fi; done; \
	if [[ -z $$python ]]; then \
		echo "error: no Python 3.11 (tried $(PYTHON), python3.11, python3)." >&2; \
		echo "Install Python 3.11 with its venv module, or name one: make PYTHON=/path/to/python3.11 setup" >&2; \
		exit 1; fi; \
	echo "setup: $(VENV) with $$("$$python" --version)"; \
	"$$python" -m venv $(VENV)
	@$(PIP) install --no-deps --require-hashes -r requirements/bootstrap.lock
	@touch $@

# pip is the fallback where only pip knows the way to the packages (a mirror in pip.conf).
$(INSTALLED): $(BOOTSTRAPPED) requirements/cpu.lock requirements/torch.txt pyproject.toml
	@echo "setup: packages of requirements/cpu.lock"
	@$(UV) pip install --quiet --python $(BIN)/python --no-deps --require-hashes -r requirements/cpu.lock || { \
		echo "setup: uv could not install the lock; trying pip"; \
		$(PIP) install --no-deps --require-hashes -r requirements/cpu.lock; }
	@echo "setup: $$(cat requirements/torch.txt)"
	@$(PIP) install --no-warn-conflicts $(TORCH_PIP_ARGS) -r requirements/torch.txt
	@echo "setup: nemo_prolong, editable"
	@$(PIP) install --no-deps --no-build-isolation -e . 2> $(LOG) || { cat $(LOG) >&2; exit 1; }
	@echo "setup: imports (compiles the bytecode of the libraries, once)"
	@env -u PYTHONDONTWRITEBYTECODE $(BIN)/python docker/smoke.py --lock requirements/cpu.lock --expect python=3.11 \
		--expect "torch=$$(sed 's/.*==//' requirements/torch.txt)" > $(LOG) 2>&1 || { cat $(LOG) >&2; exit 1; }
	@touch $@

# The reference implementation of MDS wants older packages than NeMo, and more of them.
$(INTEROP)/.installed: $(BOOTSTRAPPED) requirements/interop.lock requirements/torch.txt
	@echo "test-interop: $(INTEROP) with requirements/interop.lock, $$(cat requirements/torch.txt)"
	@$(BIN)/python -m venv $(INTEROP)
	@$(INTEROP)/bin/python -m pip -qq --disable-pip-version-check install --no-deps --require-hashes \
		-r requirements/interop.lock
	@$(INTEROP)/bin/python -m pip -qq --disable-pip-version-check install --no-warn-conflicts $(TORCH_PIP_ARGS) \
		-r requirements/torch.txt
	@touch $@

# The other major version of transformers, for reading what was exported.
$(TRANSFORMERS5)/.installed: $(BOOTSTRAPPED) requirements/transformers5.lock requirements/torch.txt
	@echo "test-interop: $(TRANSFORMERS5) with requirements/transformers5.lock, $$(cat requirements/torch.txt)"
	@$(BIN)/python -m venv $(TRANSFORMERS5)
	@$(TRANSFORMERS5)/bin/python -m pip -qq --disable-pip-version-check install --no-deps --require-hashes \
		-r requirements/transformers5.lock
	@$(TRANSFORMERS5)/bin/python -m pip -qq --disable-pip-version-check install --no-warn-conflicts $(TORCH_PIP_ARGS) \
		-r requirements/torch.txt
	@touch $@

# Checks of manifests and shell scripts, which nothing else needs.
$(LAUNCH)/.installed: $(BOOTSTRAPPED) requirements/launch.lock
	@echo "test-launch: $(LAUNCH) with requirements/launch.lock"
	@$(BIN)/python -m venv $(LAUNCH)
	@$(LAUNCH)/bin/python -m pip -qq --disable-pip-version-check install --no-deps --require-hashes \
		-r requirements/launch.lock
	@touch $@

# Sets python to a Python 3.12.
define FIND_PYTHON312
python=; for candidate in $(PYTHON312) python3.12 $${PYENV_ROOT:-$$HOME/.pyenv}/versions/3.12*/bin/python3.12; do \
	if "$$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2> /dev/null; \
	then python=$$candidate; break; fi; done; \
if [[ -z $$python ]]; then \
	echo "error: no Python 3.12. Name one with PYTHON312=/path/to/python3.12." >&2; exit 1; fi;
endef

$(IMAGE_TOOLS)/.installed: $(BOOTSTRAPPED) requirements/image-tools.lock
	@echo "lint-image: $(IMAGE_TOOLS) with requirements/image-tools.lock"
	@$(BIN)/python -m venv --clear $(IMAGE_TOOLS)
	@$(IMAGE_TOOLS)/bin/python -m pip -qq --disable-pip-version-check install --no-deps --require-hashes \
		-r requirements/image-tools.lock
	@touch $@

# The lock of the container, with what the container brings itself: the CUDA build of torch and Transformer Engine. Its
# torch extension has no wheel and is compiled unless TE_EXTENSION names one; that takes nvcc, headers are the packages'.
$(TE)/.installed: $(BOOTSTRAPPED) requirements/gpu-py312.lock requirements/te.lock requirements/te-extension.txt
	@$(FIND_PYTHON312) \
	echo "test-te: $(TE) with $$("$$python" --version)"; \
	"$$python" -m venv --clear $(TE)
	@for lock in gpu-py312 te; do \
		echo "test-te: packages of requirements/$$lock.lock"; \
		$(UV) pip install --quiet --python $(TE)/bin/python --no-deps --require-hashes -r requirements/$$lock.lock || \
		$(TE)/bin/python -m pip -qq install --no-deps --require-hashes -r requirements/$$lock.lock; done
	@echo "test-te: torch extension of Transformer Engine ($(TE_EXTENSION))"
	@NVTE_FRAMEWORK=pytorch CUDA_HOME=$${CUDA_HOME:-/usr/local/cuda} \
		CPATH=$(TE_CUDA)/cu13/include:$(TE_CUDA)/cudnn/include:$(TE_CUDA)/nccl/include \
		$(TE)/bin/python -m pip -q --disable-pip-version-check install --no-deps --no-build-isolation $(TE_EXTENSION)
	@touch $@
