# Every target sets up .venv on its first call; a later call installs again only if setup.py or constraints.txt changed.
PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help install demo test lint bench

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 12

install: .venv/installed-train  ## set up .venv with vmzoo and everything that training needs

demo: .venv/installed-train  ## train on handwritten digits (CPU, about 3 minutes), then predict and draw
	$(BIN)/python tools/demo.py

test: .venv/installed-train,dev  ## run the tests
	$(BIN)/python -m pytest

lint: .venv/installed-train,dev  ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: .venv/installed-train  ## time the operators and models
	$(BIN)/python tools/benchmark.py

.venv/installed-%: setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[$*]'
	touch $@
