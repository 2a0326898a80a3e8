# Two commands matter: `make reproduce` and `make test`. `make help` lists the others.
PYTHON ?= python3
PROFILE ?= auto
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
LONG_CONTEXT = $(BIN)/python -m stem.experiments.long_context --profile $(if $(filter auto,$(PROFILE)),full,$(PROFILE))
CHOSEN = $(if $(METHODS),--methods $(METHODS)) $(if $(MODEL),--model $(MODEL)) $(if $(LENGTHS),--lengths $(LENGTHS))
NBVAL := --nbval-lax --nbval-current-env --nbval-cell-timeout=7200 --nbval-kernel-startup-timeout=1800 -p no:cacheprovider
SIDE_BY_SIDE := -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder  # a process for each core; each takes whole files of tests, in their order
NOTEBOOKS = $(sort $(wildcard notebooks/09_*.ipynb)) $(filter-out notebooks/09_%,$(sort $(wildcard notebooks/*.ipynb)))  # longest first

.DEFAULT_GOAL := help
.PHONY: help env reproduce test unit-test notebook-test serve-test lint theory correctness speed hopper training long_context evaluation quality extend serving tables notebooks lab lab-test clean

help: ## list the targets
	@sed -n 's/^\([a-z_-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

env: $(INSTALLED) ## create .venv with the pinned packages; every target below does this first when needed
	@echo "$(VENV) is ready"

$(INSTALLED): environment.yml pyproject.toml scripts/install.py
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(sys.version_info < (3, 11) and f"Python 3.11 or newer is needed, $(PYTHON) is {v}; try: make env PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python scripts/install.py
	@touch $@

reproduce: $(INSTALLED) ## run notebooks 01-09 into results/notebooks/  [PROFILE=smoke|full|auto ONLY=02 FORCE=1 SILENCE=30]
	$(BIN)/python scripts/reproduce.py --profile $(PROFILE) $(if $(ONLY),--only $(ONLY)) $(if $(filter-out 0,$(FORCE)),--force) $(if $(SILENCE),--silence $(SILENCE))

test: unit-test notebook-test ## both targets below, in turn, or with `make -j2 test` side by side

unit-test: $(INSTALLED) ## unit, kernel and repository tests
	$(BIN)/python -m pytest -q -p no:nbval $(SIDE_BY_SIDE) tests

notebook-test: $(INSTALLED) ## the committed notebooks through nbval, one for each core at a time
	$(BIN)/python -m pytest -q $(NBVAL) $(SIDE_BY_SIDE) $(NOTEBOOKS)

serve-test: $(INSTALLED) ## install vLLM's CPU build beside the pinned packages and test serving with it
	$(BIN)/python scripts/install_vllm.py
	$(BIN)/python -m pytest -q tests/serving tests/experiments/serving

lint: $(INSTALLED) ## ruff over code and notebooks
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

theory: $(INSTALLED) ## run notebook 01, which writes results/theory/  [PROFILE=smoke|full|auto]
	$(BIN)/python -m stem.experiments.theory --profile $(PROFILE)

correctness: $(INSTALLED) ## run notebook 03, which writes results/correctness/  [PROFILE=smoke|full|auto]
	$(BIN)/python -m stem.experiments.correctness --profile $(PROFILE)

speed: $(INSTALLED) ## measure this machine and write results/speed/  [PROFILE=smoke|full LENGTHS="1024 2048"]
	$(BIN)/python -m stem.experiments.speed --profile $(if $(filter auto,$(PROFILE)),full,$(PROFILE)) $(if $(LENGTHS),--lengths $(LENGTHS))
	$(BIN)/python -m stem.experiments.speed.variants --profile $(if $(filter auto,$(PROFILE)),full,$(PROFILE))
	$(BIN)/python -m stem.experiments.speed.fresh --profile $(if $(filter auto,$(PROFILE)),full,$(PROFILE))
	$(BIN)/python -m stem.experiments.speed.coverage --profile $(if $(filter auto,$(PROFILE)),full,$(PROFILE))
	$(BIN)/python -m stem.experiments.speed.shared --profile $(if $(filter auto,$(PROFILE)),full,$(PROFILE))
	$(BIN)/python -m stem.experiments.speed.shared_memory --profile $(if $(filter auto,$(PROFILE)),full,$(PROFILE))

hopper: $(INSTALLED) ## time the stages of the Hopper kernel and write results/hopper/; needs a Hopper GPU  [PROFILE=smoke|full]
	$(BIN)/python -m stem.experiments.hopper --profile $(if $(filter auto,$(PROFILE)),full,$(PROFILE))

training: $(INSTALLED) ## train the small models and write results/training/; resumes in runs/  [PROFILE=smoke|full]
	$(BIN)/python -m stem.experiments.training --profile $(if $(filter auto,$(PROFILE)),full,$(PROFILE))

long_context: $(INSTALLED) ## compare methods on real models, the three targets below: writes results/long_context/  [PROFILE=smoke|full]
	$(LONG_CONTEXT)

evaluation: $(INSTALLED) ## needles that every method finds  [PROFILE=smoke|full METHODS="stem xattention" MODEL=qwen2.5-coder-0.5b LENGTHS="16384"]
	$(LONG_CONTEXT) answers $(CHOSEN)

quality: $(INSTALLED) ## loss of every method on documents, errors of the logits, time of selection  [PROFILE, METHODS, MODEL and LENGTHS as above]
	$(LONG_CONTEXT) loss $(CHOSEN)
	$(LONG_CONTEXT) logits $(if $(MODEL),--model $(MODEL))
	$(LONG_CONTEXT) selection_cost
	$(LONG_CONTEXT) choice $(CHOSEN)
	$(LONG_CONTEXT) tuning $(if $(MODEL),--model $(MODEL))
	$(LONG_CONTEXT) matched $(if $(MODEL),--model $(MODEL)) $(if $(LENGTHS),--length $(firstword $(LENGTHS)))

extend: $(INSTALLED) ## train the embedded model to 32K tokens and compare methods there  [PROFILE=smoke|full]
	$(LONG_CONTEXT) extension

serving: $(INSTALLED) ## measure vLLM with and without Stem and write results/serving/; needs vLLM, see serve-test  [PROFILE=smoke|full]
	$(BIN)/python -m stem.experiments.serving --profile $(if $(filter auto,$(PROFILE)),full,$(PROFILE))

tables: $(INSTALLED) ## rewrite the tables and sentences of README.md and results/README.md, and results/figures/
	$(BIN)/python -m stem.experiments.tables
	$(BIN)/python scripts/overview.py

notebooks: $(INSTALLED) ## run the smoke profile and put the executed copies into notebooks/
	$(BIN)/python scripts/reproduce.py --profile smoke --publish $(if $(SILENCE),--silence $(SILENCE))

lab: $(INSTALLED) ## open the notebooks in JupyterLab
	$(BIN)/jupyter lab --notebook-dir . notebooks/01_theory.ipynb

lab-test: $(INSTALLED) ## run every notebook in JupyterLab in a headless Chromium (needs Debian's chromium)  [ONLY=02]
	$(BIN)/python -m pip install --quiet --disable-pip-version-check playwright==1.65.2
	$(BIN)/python scripts/lab_test.py $(ONLY)

clean: ## remove caches and what smoke runs wrote; .venv, committed results and full copies stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache results/lab results/notebooks/smoke
	find stem kernels tests scripts notebooks -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf
	find results -name '*-smoke.csv' -o -name '*.log' -o -name '*.partial' -o -name '*.partial.ipynb' | xargs rm -f
