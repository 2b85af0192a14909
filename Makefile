.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help install quickstart quickstart-mm test lint clean

help:  ## show this help
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 24

install: .venv/installed  ## make .venv with everything pinned in constraints.txt

.venv/installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 …")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev,demo,quickstart,tensorboard]'
	touch $@

quickstart: install  ## fine-tune a real 135M model on this machine and show what changed (5 to 21 minutes on 2 cores)
	$(BIN)/python scripts/quickstart.py

quickstart-mm: install  ## teach it to read handwritten digits: alignment, then QPEFT on pictures (10 to 70 minutes on 2 cores)
	$(BIN)/python scripts/quickstart_mm.py

test: install  ## run the whole test suite on the CPU, and the GPU tests where there is one
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
	    $(BIN)/python -m pytest -m gpu; fi
	CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest

lint: install  ## check style with ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:  ## remove .venv and what quickstart made
	rm -rf .venv quickstart
