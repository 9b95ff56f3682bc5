PYTHON ?= python3
BIN := .venv/bin
# The constraints also decide which torch is installed: without them pip takes the newest one.
PIP_INSTALL := $(BIN)/pip install -qq --disable-pip-version-check --no-compile -c constraints.txt
# Modules that every command loads. Importing them once compiles what is used and nothing else,
# which takes half as long as letting pip compile every installed file.
WARM_UP := import datasets, hydra, matplotlib.pyplot, pandas, pytorch_lightning, transformers.models.bert.modeling_bert
QUICKSTART_DIR := outputs/quickstart/$(shell date +%Y-%m-%d_%H-%M-%S)

# The warm-up and the tests rely on compiled files being kept.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: venv quickstart test test-slow lint clean

venv: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	@echo "Installing into .venv (about a minute) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(PIP_INSTALL) -e .
	@$(BIN)/python -W ignore -c "$(WARM_UP)"
	@touch $@

.venv/.installed-test: .venv/.installed
	@echo "Installing what the tests need ..."
	@$(PIP_INSTALL) -e ".[test,slurm,interop]"
	@touch $@

.venv/.installed-dev: .venv/.installed
	@echo "Installing the linters ..."
	@$(PIP_INSTALL) -e ".[dev]"
	@touch $@

# Two jobs at a time, one thread each.
quickstart: export OMP_NUM_THREADS = 1
quickstart: .venv/.installed
	$(BIN)/hydratron pretrain -m experiment=quickstart hydra/launcher=joblib hydra.launcher.n_jobs=2 hydra.sweep.dir=$(QUICKSTART_DIR)
	$(BIN)/hydratron report $(QUICKSTART_DIR)

test: .venv/.installed-test
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not gpu and not multi_gpu"

test-slow: .venv/.installed-test
	$(BIN)/python -m pytest -q -m slow

lint: .venv/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/basedpyright

# Keeps outputs/: results are not build products.
clean:
	rm -rf .venv build dist .pytest_cache .ruff_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
