# Two commands: `make demo` sets up and runs the main job, `make test` sets up and passes the tests.
PYTHON ?= python3
BIN := .venv/bin
CI_MARKS := not cluster and not slow
MARKS := $(CI_MARKS) and not thorough
NAME := digits-demo-$(shell date +%m%d-%H%M%S)

.PHONY: setup demo test test-ci test-rack test-cluster test-all answers lint

setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/heliostat sweep digits --name $(NAME)
	$(BIN)/heliostat train runs/$(NAME)/best.yaml --name $(NAME)-best --set scale.workers=2
	@echo "see every run and trial: $(BIN)/heliostat ui"

# Some minutes; whole runs, sweeps and hosts are left out.
test: setup
	$(BIN)/pytest -m "$(MARKS)" --durations=25 $(TESTS)

# What every change must pass; `.ci/run` runs these tests in parts, two at a time.
test-ci:
	$(MAKE) test MARKS="$(CI_MARKS)"

# Tests on hosts that are Linux namespaces, with real SSH: need root, openssh-server, rsync, iproute2.
test-rack: setup
	$(BIN)/pytest -m "not cluster" tests/rack

# The tests on whole clusters, which take minutes: training while machines are lost, emulated AWS.
test-cluster: setup
	$(BIN)/pytest -m cluster --durations=25

# All tests; they take most of an hour.
test-all: setup
	$(BIN)/pytest -m "" --durations=25

# Compares the workloads with known answers and writes docs/answers.md; takes some minutes.
answers: setup
	$(BIN)/python benchmarks/answers.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
