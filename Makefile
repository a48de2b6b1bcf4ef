# Every target sets up .venv on its first call; a later call installs again only if setup.py or constraints.txt changed.
# PIP_FIND_LINKS and pip's other variables pass through. WORKERS is how many processes test side by side, each with one
# thread and up to 3 GiB of memory. DEMO_ARGS goes to the demo's training (DEMO_ARGS='--epochs 1').
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help install demo test lint bench

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 12

install: $(VENV)/installed-train  ## set up .venv with vmzoo and everything that training needs

demo: $(VENV)/installed-train  ## train on handwritten digits (CPU, 1 to 2 minutes), then predict and draw
	$(BIN)/vmzoo train vmamba_nano_digits --resume $(DEMO_ARGS)
	$(BIN)/python tools/make_tiny_data.py data --only digits
	$(BIN)/vmzoo predict --checkpoint work_dirs/vmamba_nano_digits/best.pth data/digits/test --out outputs/digits

test: $(VENV)/installed-train,mm,medical,dev  ## run the tests
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

lint: $(VENV)/installed-train,mm,medical,dev  ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(VENV)/installed-train  ## time the operators and models
	$(BIN)/python tools/benchmark.py ops
	$(BIN)/python tools/benchmark.py models

# An interrupted venv has a python but no pip; made again, it is whole.
$(VENV)/installed-%: setup.py constraints.txt
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[$*]'
	touch $@
