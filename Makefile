# attn_notes: every target sets up its own environment in .venv on first use.
.DEFAULT_GOAL := help
.PHONY: help site docs test quick notebooks experiments lab bench gpu clean

PY  := .venv/bin/python
ENV := .venv/.ready
# Numbers in the book are made on one thread and without the network; so are the checks.
export OMP_NUM_THREADS = 1
export MKL_NUM_THREADS = 1
export HF_HUB_OFFLINE = 1
export PYTHONHASHSEED = 0
WORKERS ?= 2
PORT ?= 8000

help:           ## this list
	@sed -n 's/^\([a-z]*\):.*## /\1 /p' Makefile | while read -r name text; do printf '  make %-12s %s\n' "$$name" "$$text"; done

$(ENV): pyproject.toml constraints.txt
	@for python in python3.11 python3.12 python3.13 python3 python; do \
	  $$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && break; python=; done; \
	  test -n "$$python" || { echo "attn_notes needs Python 3.11, 3.12 or 3.13 on the path"; exit 1; }; \
	  test -x $(PY) || { echo "setting up .venv, once"; $$python -m venv .venv; }
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

site: docs      ## the book, built from the stored outputs and served here
	@test -n "$$CI" || $(PY) tools/site/serve.py --port $(PORT)

docs: $(ENV)    ## build docs/ and README.md only
	$(PY) tools/site/build.py

test: $(ENV)    ## every check: notebooks, claims, package, site, wheel
	$(PY) -m pytest tests nbs --nbval -n $(WORKERS) --dist loadfile

quick: $(ENV)   ## the unit tests alone (CHAPTER=cells for one chapter's)
	$(PY) -m pytest $(if $(CHAPTER),$(wildcard tests/*/test_$(CHAPTER).py),tests) -m "not slow" --ignore tests/book --ignore tests/site -n $(WORKERS) --dist loadfile

notebooks: $(ENV) ## run every notebook again, store its outputs, export the package
	$(PY) tools/notebooks.py run

experiments: $(ENV) ## run what is missing of the long experiments (CHAPTER=cells for one chapter's)
	$(PY) -m attn_notes.training.experiments $(CHAPTER)

lab: $(ENV)     ## open the notebooks in Jupyter
	$(PY) -m jupyter lab --notebook-dir nbs

bench: $(ENV)   ## time the package beside the reference libraries
	.venv/bin/attn-notes bench

# On a machine with an accelerator there may be no network to build .venv with: any Python that has torch will do.
gpu:            ## check and time every model on the accelerator that is here
	$(if $(wildcard $(ENV)),$(PY),python3) -m attn_notes.training.gpu

clean:          ## remove what the checks and builds leave behind; .venv and docs/ stay
	rm -rf build dist *.egg-info .pytest_cache .hypothesis .cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
