# The commands of this repository. `make` alone lists them.

PYTHON ?= python3
VENV ?= .venv
# A package index for everything but torch, and one for torch alone; empty means pip's own configuration decides.
INDEX_URL ?=
TORCH_INDEX_URL ?=
# More arguments for pytest, such as ARGS="-k packing -x".
ARGS ?=
CUDA ?=

# What the environment holds: cpu, cu12 or cu13. `make install-gpu` records it, so that a later `make test` keeps the
# CUDA build of torch.
FLAVOUR = $(or $(file < $(VENV)/flavour),cpu)
CONSTRAINTS = constraints/$(FLAVOUR).txt
TORCH = $(shell sed -n 's/^torch==//p' $(CONSTRAINTS))
# Two stamps: what a user needs, and what tests and linters need besides. The second contains the first.
USER_STAMP = $(VENV)/installed
DEV_STAMP = $(VENV)/installed-dev
USER_EXTRAS = quickstart
# The tests decode with DALI, also on the CPU; `make install-gpu` brings the one of its CUDA version.
DEV_EXTRAS = quickstart,chat,dev$(if $(filter cpu,$(FLAVOUR)),$(COMMA)dali)
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check install -qq --constraint $(CONSTRAINTS)
INDEX = $(if $(INDEX_URL),--index-url $(INDEX_URL))
TORCH_INDEX = $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL),$(INDEX))
# In front of slow commands of one shell: a line a minute, until that shell ends.
LINE_A_MINUTE = begin=$$(date +%s); \
	( while sleep 60 > /dev/null 2>&1 && kill -0 $$$$ 2> /dev/null; do \
	echo "    installing: $$((($$(date +%s) - begin) / 60)) min, $$(du -sh $(VENV) | cut -f1) in $(VENV)"; done ) & \
	ticker=$$!; trap "kill $$ticker 2> /dev/null" EXIT;

COMMA = ,

# What the quickstart makes in its folder (MARKER and MADE of examples/quickstart/run.py).
QUICKSTART_MARKER = .megatron_eve_quickstart
QUICKSTART_FILES = data teacher reference interrupted logs questions.jsonl answers.jsonl loss.png

.DEFAULT_GOAL := help
.PHONY: help install install-dev install-gpu quickstart test test-slow lint format clean check-python check-cuda

help: ## List these commands
	@echo "megatron_eve: pretraining of encoder-free vision-language models on megatron-core"
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "Variables: PYTHON=python3.11  VENV=.venv  ARGS='-k packing' (to pytest)"
	@echo "           INDEX_URL=...  TORCH_INDEX_URL=... (other package indexes; see README)"

install: $(USER_STAMP) ## Make the virtual environment .venv with what a user needs, pinned by constraints/cpu.txt

install-dev: $(DEV_STAMP) ## Add what tests, linters and the chat page need: DALI, gradio, a browser driver

$(USER_STAMP): EXTRAS = $(USER_EXTRAS)
$(DEV_STAMP): EXTRAS = $(DEV_EXTRAS)
$(USER_STAMP) $(DEV_STAMP): pyproject.toml setup.py $(wildcard constraints/*.txt) | check-python
	@echo "==> $(VENV): a virtual environment with the versions of $(CONSTRAINTS)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(LINE_A_MINUTE) \
	echo "==> torch $(TORCH), first and alone, so that nothing else chooses its version"; \
	$(PIP) $(TORCH_INDEX) torch==$(TORCH) || exit 1; \
	echo "==> megatron_eve [$(EXTRAS)]"; \
	$(PIP) $(INDEX) --editable '.[$(EXTRAS)]' || exit 1; \
	found="$$($(BIN)/python -c 'import torch; print(torch.__version__)')"; case "$$found" in \
		$(TORCH)|$(TORCH)+*) ;; \
		*) echo "error: torch $(TORCH) was asked for and $$found is there: rm -r $(VENV), then make install with" \
			"INDEX_URL or TORCH_INDEX_URL set (see README)" >&2; exit 1 ;; esac; \
	echo "==> $(VENV) is ready: torch $$found, $$(du -sh $(VENV) | cut -f1), $$(($$(date +%s) - begin)) s"
	@echo $(FLAVOUR) > $(VENV)/flavour
	@touch $(USER_STAMP) $@

install-gpu: FLAVOUR = cu$(CUDA)
install-gpu: check-cuda ## For GPUs with CUDA=12 or CUDA=13: what a user needs, TransformerEngine and DALI
	@test "$$(cat $(VENV)/flavour 2>/dev/null)" = $(FLAVOUR) || rm -f $(USER_STAMP) $(DEV_STAMP)
	@$(MAKE) --no-print-directory install FLAVOUR=$(FLAVOUR)
	@found="$$($(BIN)/python -c 'import torch; print(torch.version.cuda)')"; case "$$found" in $(CUDA).*) ;; *) \
		echo "error: this torch was built for CUDA $$found, not $(CUDA): set TORCH_INDEX_URL to an index with CUDA wheels" >&2; \
		exit 1 ;; esac
	@$(LINE_A_MINUTE) \
	echo "==> TransformerEngine: the core library as a wheel, then its torch part, compiled here (many minutes; MAX_JOBS=n sets the jobs)"; \
	$(PIP) $(INDEX) setuptools wheel ninja pybind11 transformer-engine transformer-engine-cu$(CUDA) || exit 1; \
	site="$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"; \
		CUDA_HOME="$${CUDA_HOME:-$$(nvcc --dryrun -x cu -c -o /dev/null /dev/null 2>&1 | sed -n 's/^#\$$ TOP=//p')}" \
		CUDNN_PATH="$$site/nvidia/cudnn" CPATH="$$(echo "$$site"/nvidia/*/include | tr ' ' ':')$${CPATH:+:$$CPATH}" \
		NVTE_FRAMEWORK=pytorch PATH="$(abspath $(BIN)):$$PATH" \
		$(PIP) $(INDEX) --no-build-isolation transformer-engine-torch || exit 1; \
	echo "==> DALI"; \
	$(PIP) $(INDEX) nvidia-dali-cuda$(CUDA)0
	@$(BIN)/python -c "import torch, transformer_engine.pytorch, nvidia.dali; print('==> all of it imports')"

check-python:
	@$(PYTHON) -c "import sys; v = sys.version_info; (3, 11) <= v < (3, 14) or sys.exit( \
	'error: Python 3.11, 3.12 or 3.13 is needed and $(PYTHON) is %d.%d; choose another: make install PYTHON=python3.11' % v[:2])" \
	|| { command -v $(PYTHON) > /dev/null || echo "error: $(PYTHON) is not there: make install PYTHON=..." >&2; exit 1; }

check-cuda:
	@case "$(CUDA)" in 12|13) ;; *) echo "error: say which CUDA: make install-gpu CUDA=12, or CUDA=13" >&2; exit 1;; esac
	@command -v nvcc > /dev/null || { echo "error: nvcc is not on the PATH. TransformerEngine's torch part is compiled here: install" \
		"the CUDA $(CUDA) toolkit, put its bin folder on the PATH, and repeat" >&2; exit 1; }
	@nvcc --version | grep -q "release $(CUDA)\." || { echo "error: CUDA=$(CUDA) was asked for and this is another nvcc:" >&2; \
		nvcc --version >&2; exit 1; }

quickstart: install ## The whole path on two cores: photos, pretraining, a kill, a resume, captions
	@$(BIN)/python examples/quickstart/run.py

test: install-dev ## All tests but the slow ones and those for a GPU
	@$(BIN)/python -m pytest $(ARGS)

test-slow: install-dev ## The slow tests, the quickstart from end to end among them
	@$(BIN)/python -m pytest -m "slow and not gpu" $(ARGS)

lint: install-dev ## Style (ruff) and types (mypy)
	@$(BIN)/python -m ruff check .
	@$(BIN)/python -m ruff format --check .
	@$(BIN)/python -m mypy

format: install-dev ## Let ruff sort the imports and set the layout
	@$(BIN)/python -m ruff check --fix .
	@$(BIN)/python -m ruff format .

clean: ## Remove what make built and ran here: .venv and what the quickstart made too
	@test ! -e $(VENV) || test -e $(USER_STAMP) || { echo "error: $(VENV) was not made by make install: remove it yourself" >&2; exit 1; }
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	@test ! -e quickstart/$(QUICKSTART_MARKER) || { rm -rf $(addprefix quickstart/,$(QUICKSTART_FILES) $(QUICKSTART_MARKER)); \
		rmdir quickstart 2> /dev/null || echo "quickstart/ holds files that the quickstart did not make: they stay"; }
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
