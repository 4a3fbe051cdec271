# `make run` and `make test` need only Python 3.11+, pip and make. A virtual environment that is active is used;
# otherwise .venv is created here.
PYTHON ?= python3
VENV := $(if $(VIRTUAL_ENV),$(VIRTUAL_ENV),.venv)
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.slmrec-$(shell cksum < requirements.txt | cut -d' ' -f1)

.PHONY: run test setup lint

run: setup
	$(PY) train_sr_trad.py --resume auto
	$(PY) extract_emb.py
	$(PY) finetune.py --resume auto
	$(PY) distill.py --resume auto

test: setup lint
	$(PY) -m pytest

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

setup: $(INSTALLED)

$(INSTALLED): | $(PY)
	@$(PY) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else 0'
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(PY):
	$(PYTHON) -m venv $(VENV)
