# The commands of this repository. `make` alone lists them.

PYTHON ?= python3
VENV ?= .venv
# A package index for everything but torch, and one for torch alone; empty means pip's own configuration decides.
INDEX_URL ?=
TORCH_INDEX_URL ?=
# More arguments for pytest, such as ARGS="-k packing -x"; ARGS="-n 0" runs all in one process.
ARGS ?=
# Two files of tests at a time: more ask for much memory, since some of them start four ranks.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile
CUDA ?=

# What the environment holds: cpu, cu12 or cu13. `make install-gpu` records it, so that a later `make test` keeps the
# CUDA build of torch.
FLAVOUR = $(or $(file < $(VENV)/flavour),cpu)
CONSTRAINTS = constraints/$(FLAVOUR).txt
TORCH = $(shell sed -n 's/^torch==//p' $(CONSTRAINTS))
# Files of the environment, written when it holds what a user needs; what evaluation, curation, and tests and linters need.
STAMP = $(VENV)/installed
EVAL_STAMP = $(VENV)/installed-eval
CURATE_STAMP = $(VENV)/installed-curate
DEV_STAMP = $(VENV)/installed-dev
# Left in an environment that was made here; `make clean` deletes no other.
MARKER = $(VENV)/.megatron_eve
PINS = pyproject.toml setup.py $(wildcard constraints/*.txt)
BIN = $(VENV)/bin
PIP = $(BIN)/python tools/pip_install.py --constraint $(CONSTRAINTS)
INDEX = $(if $(INDEX_URL),--index-url $(INDEX_URL))
TORCH_INDEX = $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL),$(INDEX))

COMMA = ,
# DALI decodes on the CPU in the tests; with a GPU, `make install-gpu` takes the one of its CUDA version.
DEV_EXTRAS = dev,chat$(if $(filter cpu,$(FLAVOUR)),$(COMMA)dali)
# Checks that what was installed last has left torch alone.
CHECK_TORCH = found="$$($(BIN)/python -c 'import torch; print(torch.__version__)')"; case "$$found" in \
	$(TORCH)|$(TORCH)+*) ;; \
	*) echo "error: torch $(TORCH) was asked for and $$found is there: rm -r $(VENV), then make install with" \
		"INDEX_URL or TORCH_INDEX_URL set (see README)" >&2; exit 1 ;; esac
# Seconds since make began, and the size of the environment.
BEGAN := $(shell date +%s)
SPENT = $$(($$(date +%s) - $(BEGAN))) s, $$(du -sh --si --apparent-size $(VENV) | cut -f1)B in $(VENV)

.DEFAULT_GOAL := help
.PHONY: help install install-eval install-curate install-dev install-gpu quickstart vila vila-u vila-u-tower eve2 curation test test-slow lint format clean check-python check-cuda

help: ## List these commands
	@echo "megatron_eve: pretraining of encoder-free vision-language models on megatron-core"
	@echo
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "Variables: PYTHON=python3.11  VENV=.venv  ARGS='-k packing' (to pytest)"
	@echo "           INDEX_URL=...  TORCH_INDEX_URL=... (other package indexes; see README)"

install: $(STAMP) ## What a user needs, into .venv, with the versions of constraints/cpu.txt

$(STAMP): $(PINS) | check-python
	@echo "==> $(VENV): a virtual environment with the versions of $(CONSTRAINTS)"
	@test -x $(BIN)/python || { $(PYTHON) -m venv $(VENV) && touch $(MARKER); }
	@echo "==> torch $(TORCH), first and alone, so that nothing else chooses its version"
	@$(PIP) $(TORCH_INDEX) torch==$(TORCH)
	@echo "==> megatron_eve, and what its quickstart needs"
	@$(PIP) $(INDEX) --editable '.[quickstart]'
	@$(CHECK_TORCH)
	@echo $(FLAVOUR) > $(VENV)/flavour
	@touch $@
	@echo "==> megatron_eve is installed, with torch $(TORCH): $(SPENT)"

install-eval: $(EVAL_STAMP) ## Adds what tools/evaluate.py needs: lmms-eval and lm-eval

$(EVAL_STAMP): $(STAMP) $(PINS)
	@echo "==> what evaluation needs: lmms-eval (without most of what it asks for) and lm-eval"
	@$(PIP) --constraint constraints/eval.txt $(INDEX) --editable '.[eval]'
	@$(PIP) --constraint constraints/eval.txt $(INDEX) --no-deps lmms-eval
	@$(CHECK_TORCH)
	@touch $@
	@echo "==> the evaluation harnesses are installed: $(SPENT)"

install-curate: $(CURATE_STAMP) ## Adds what tools/curate.py needs: datatrove, faiss and imagehash

$(CURATE_STAMP): $(STAMP) $(PINS)
	@echo "==> what curation needs: datatrove, faiss and imagehash"
	@$(PIP) $(INDEX) --editable '.[curate]'
	@$(CHECK_TORCH)
	@touch $@
	@echo "==> the packages of curation are installed: $(SPENT)"

install-dev: $(DEV_STAMP) ## Adds evaluation, curation, tests, linters, the chat's page with its browser driver, DALI

$(DEV_STAMP): $(EVAL_STAMP) $(CURATE_STAMP) $(PINS)
	@echo "==> what tests and linters need; the chat's page and a driver for browsers$(if $(filter cpu,$(FLAVOUR)),; DALI)"
	@$(PIP) $(INDEX) --editable '.[$(DEV_EXTRAS)]'
	@$(CHECK_TORCH)
	@touch $@
	@echo "==> tests and linters are installed: $(SPENT)"

install-gpu: FLAVOUR = cu$(CUDA)
install-gpu: check-cuda ## The same for GPUs with CUDA=12 or CUDA=13: adds TransformerEngine and DALI
	@test "$$(cat $(VENV)/flavour 2>/dev/null)" = $(FLAVOUR) || rm -f $(STAMP)
	@$(MAKE) --no-print-directory install FLAVOUR=$(FLAVOUR)
	@found="$$($(BIN)/python -c 'import torch; print(torch.version.cuda)')"; case "$$found" in $(CUDA).*) ;; *) \
		echo "error: this torch was built for CUDA $$found, not $(CUDA): set TORCH_INDEX_URL to an index with CUDA wheels" >&2; \
		exit 1 ;; esac
	@echo "==> TransformerEngine: the core library as a wheel, then its torch part, compiled here (many minutes; MAX_JOBS=n sets the jobs)"
	@$(PIP) $(INDEX) setuptools wheel ninja pybind11 transformer-engine transformer-engine-cu$(CUDA)
	@site="$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"; \
		CUDA_HOME="$${CUDA_HOME:-$$(nvcc --dryrun -x cu -c -o /dev/null /dev/null 2>&1 | sed -n 's/^#\$$ TOP=//p')}" \
		CUDNN_PATH="$$site/nvidia/cudnn" CPATH="$$(echo "$$site"/nvidia/*/include | tr ' ' ':')$${CPATH:+:$$CPATH}" \
		NVTE_FRAMEWORK=pytorch PATH="$(abspath $(BIN)):$$PATH" \
		$(PIP) $(INDEX) --no-build-isolation transformer-engine-torch
	@echo "==> DALI"
	@$(PIP) $(INDEX) nvidia-dali-cuda$(CUDA)0
	@$(BIN)/python -c "import torch, transformer_engine.pytorch, nvidia.dali; print('==> all of it imports')"
	@echo "==> megatron_eve is installed for CUDA $(CUDA): $(SPENT)"

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

vila: install ## The same for VILA: a vision tower, three stages, LoRA, an export to transformers
	@$(BIN)/python examples/vila_tiny/run.py

vila-u: install ## The same for VILA-U: codes of photos, one training to read and to draw, an export
	@$(BIN)/python examples/vila_u_tiny/run.py

vila-u-tower: install ## Its tower: a training from a toy SigLIP with a kill, codes, reconstructions
	@$(BIN)/python examples/vila_u_tiny/tower.py

eve2: install ## The same for EVE v2: experts as copies, stages 0, 1 and 3, swapped photos, an export
	@$(BIN)/python examples/eve2_tiny/run.py

curation: install-curate ## Pictures for pretraining: rules, duplicates, clusters, new captions, a dataset
	@$(BIN)/python examples/curation_tiny/run.py

test: install-dev ## All tests but the slow ones and those for a GPU
	@$(PYTEST) $(ARGS)

test-slow: install-dev ## The slow tests, the quickstart from end to end among them
	@$(PYTEST) -m "slow and not gpu" $(ARGS)

lint: install-dev ## Style (ruff) and types (mypy)
	@$(BIN)/python -m ruff check .
	@$(BIN)/python -m ruff format --check .
	@$(BIN)/python -m mypy

format: install-dev ## Let ruff sort the imports and set the layout
	@$(BIN)/python -m ruff check --fix .
	@$(BIN)/python -m ruff format .

clean: ## Remove what was built and run here, .venv too; what others put there stays
	@$(PYTHON) examples/quickstart/folder.py quickstart
	@$(PYTHON) examples/quickstart/folder.py vila
	@$(PYTHON) examples/quickstart/folder.py vila_text
	@$(PYTHON) examples/quickstart/folder.py vila_pictures
	@$(PYTHON) examples/quickstart/folder.py vila_u
	@$(PYTHON) examples/quickstart/folder.py vila_u_memory
	@$(PYTHON) examples/quickstart/folder.py vila_u_tower
	@$(PYTHON) examples/quickstart/folder.py vila_u_tower_scores
	@$(PYTHON) examples/quickstart/folder.py eve2
	@$(PYTHON) examples/quickstart/folder.py curation
	@$(PYTHON) examples/quickstart/folder.py eve2_text
	@if test -f $(MARKER); then rm -rf $(VENV); elif test -e $(VENV); then \
		echo "$(VENV) was not made by make install, so it stays as it is: delete it yourself if it is not needed" >&2; fi
	@rm -rf build/lib build/bdist.* dist/megatron_eve-* megatron_eve.egg-info
	@rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis
	@rmdir --ignore-fail-on-non-empty $(wildcard build dist) 2> /dev/null || true
	@find megatron_eve tools tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
