PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_TOWER ?= Adam(lr=1e-6) / Adam
EXPERIMENTS := mnist_table heights cifar char_rnn gpt exponent held_out
JOBS ?= 2
HYPEROPT_FUZZ ?= 100000
# Not the results that are already there, which would be resumed: RESULTS=experiments/results fills in what is missing in these.
RESULTS ?= runs/experiments
# What is installed: packages, and the passes over the weights in C++.
SOURCES := setup.cfg pyproject.toml setup.py hyperopt/body/passes.cpp
# Idle threads that spin make a small model up to 100 times slower as soon as another process wants a core.
export OMP_WAIT_POLICY ?= PASSIVE

.DEFAULT_GOAL := help
.PHONY: help demo experiments figures docs test test-all fuzz lint clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

# pip is the last thing that venv writes: an interrupted creation is taken up again.
$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.experiments: $(SOURCES) | $(BIN)/pip
	$(BIN)/python -m pip install --quiet --editable '.[experiments]'
	touch $@

$(VENV)/.docs: setup.cfg pyproject.toml | $(BIN)/pip
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	touch $@

# dev contains experiments and docs: after `make test`, `make demo` and `make docs` need no network.
$(VENV)/.dev: $(SOURCES) | $(BIN)/pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $(VENV)/.experiments $(VENV)/.docs $@

demo: $(VENV)/.experiments  ## install, then train on digits from a far too small lr and watch it recover
	$(BIN)/python -m experiments.mnist --tower "$(DEMO_TOWER)" --dataset digits --epochs 30 --out runs/demo

# dev: the published code of the papers, and other people's optimizers, to compare with.
experiments: $(VENV)/.dev  ## the papers' experiments from scratch into runs/experiments, about five hours on two cores; resumes
	set -e; for name in $(EXPERIMENTS); do $(BIN)/python -m experiments.$$name --jobs $(JOBS) --out $(RESULTS); done

figures: $(VENV)/.dev  ## figures and tables of experiments/results again, from their JSON files alone
	set -e; for name in $(EXPERIMENTS); do ! ls experiments/results/$$name*.json >/dev/null 2>&1 || $(BIN)/python -m experiments.$$name --figures; done

# The source folder is the root, see docs/conf.py; -W -n: a warning or a reference that leads nowhere is an error.
docs: $(VENV)/.docs  ## render the documentation into docs/_build
	$(BIN)/python -m sphinx -q -W --keep-going -n -c docs . docs/_build
	@echo docs/_build/index.html

test: $(VENV)/.dev  ## install everything, then run the tests
	$(BIN)/python -m pytest

# The integrations, W&B and Ray are no part of dev: they take longer to install than to test. PostgreSQL is Debian's, and is installed only as
# root. Tests that lack one of them are skipped and say so.
test-all: $(VENV)/.dev  ## the tests, with those that take minutes
	$(BIN)/python -m pip install --quiet --editable '.[integrations]' wandb || echo "no integrations: their tests are skipped"
	$(BIN)/python -m pip install --quiet ray || echo "no Ray: its test is skipped"
	ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || [ "$$(id -u)" != 0 ] || apt-get install -y -qq postgresql || echo "no PostgreSQL: its tests are skipped"
	$(BIN)/python -m pytest -m ""

# Other programs in every run; the tests have 1,000 that stay the same.
fuzz: $(VENV)/.dev  ## random programs, 100,000 of them, over an hour on two cores; another number: make fuzz HYPEROPT_FUZZ=5000
	HYPEROPT_FUZZ=$(HYPEROPT_FUZZ) $(BIN)/python -m pytest tests/test_properties.py

lint: $(VENV)/.dev  ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean:  ## remove what was installed, built and cached; runs/ and data/ stay
	rm -rf $(VENV) build dist docs/_build hyperopt/body/_passes*.so *.egg-info .pytest_cache .ruff_cache .hypothesis
	find hyperopt experiments examples tests -name __pycache__ -type d -prune -exec rm -rf {} +
