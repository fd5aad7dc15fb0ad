# `make help` lists what there is; each target sets up what it needs. PYTHON=/path/to/python3.12 picks a Python.
.DEFAULT_GOAL := help
.PHONY: help setup lab tour test check test-faults lint format export stamp run docs readme quarto weights bench clean distclean
BIN := .venv/bin
SHORT := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 FOUNDATION_SHORT=1
CODE := nbs tests tools docs bench setup.py
export PYTHON

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(firstword $(MAKEFILE_LIST)) | awk -F'\t' '{ printf "  make %-11s %s\n", $$1, $$2 }'

setup: ## the environment in .venv, made anew only when the requirements change
	@for p in $(PYTHON) python3 python python2 python3.13 python3.12 python3.11 python3.10; do \
	  if "$$p" -c "" 2>/dev/null; then exec "$$p" tools/environment.py; fi; done; \
	echo "No Python was found: install Python 3.10 to 3.13 and run make again." >&2; exit 1

lab: setup ## the lessons in JupyterLab (as root, the usual container: make lab ARGS=--allow-root)
	@if [ "$$(id -u 2>/dev/null)" = 0 ] && [ -z "$(findstring --allow-root,$(ARGS))" ]; then \
	  echo "You are root, as in most containers. Jupyter wants to hear that this is meant: make lab ARGS=--allow-root" >&2; exit 1; fi
	$(BIN)/jupyter lab nbs $(ARGS)

tour: setup ## the whole life of a foundation model in five minutes: runs/tour/tour.html
	$(BIN)/foundation tour

test: lint ## lines in form, the export is fresh, every notebook runs, pytest passes
	$(BIN)/python tools/notebooks.py export --check
	$(BIN)/python tools/lessons.py
	$(SHORT) $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

check: setup ## some tests on the short plan: make check ARGS="tests/test_lora.py -k merge"
	$(SHORT) $(BIN)/python -m pytest $(ARGS)

test-faults: setup ## the long forms: 1,000 odd calls of each function, kills, damaged files, the package broken on purpose (hours)
	$(SHORT) FOUNDATION_FAULTS=1 $(BIN)/python -m pytest tests/test_fuzz.py tests/test_faults.py tests/test_laws.py tests/test_zoo.py

lint: setup ## only tell what `make format` would change and what ruff finds
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)

format: setup ## notebooks, tests and tools into form, in place
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

export: setup ## write foundation/ from the notebooks
	$(BIN)/python tools/notebooks.py export

stamp: setup ## badges, Colab cells and sidebar from settings.ini, README.md from nbs/index.ipynb
	$(BIN)/python tools/notebooks.py stamp
	$(BIN)/python tools/readme.py

run: setup ## execute stale notebooks in place, so that their outputs are true
	$(BIN)/python tools/notebooks.py run --stale

docs: setup ## the site in _site/ and README.md, from the notebooks as they stand
	$(BIN)/python tools/readme.py
	$(BIN)/python tools/build.py

quarto: setup ## the site through nbdev_docs, for those who have Quarto
	PYTHONPATH=tools $(BIN)/nbdev_docs

weights: setup ## train shipped weights again, all or NAME="..." (hours on two cores; goes on where it was stopped)
	$(BIN)/foundation weights make $(or $(NAME),all)

bench: setup ## our training steps against transformers and lightly: a table and bench/results.json (about five quiet minutes)
	$(BIN)/python -m bench

clean: ## remove what was built; the data cache and .venv stay
	rm -rf _site _proc _docs build dist runs *.egg-info .pytest_cache .ruff_cache .hypothesis docs/_static/vendor nbs/_quarto.yml nbs/nbdev.yml
	find . -path ./.venv -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -prune -exec rm -rf {} +

distclean: clean ## remove .venv as well
	rm -rf .venv
