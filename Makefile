# `make run` and `make test` need only Python 3.11+, pip and make. A virtual environment that is active is used;
# otherwise .venv is created here. Its path may hold spaces, which names of make's own can not: the shell expands it.
PYTHON ?= python3
VENV = "$${VIRTUAL_ENV:-.venv}"
PY = $(VENV)/bin/python
CHECK = -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else 0'

.PHONY: run test docs records setup lint

run: setup
	$(PY) train_sr_trad.py --resume auto
	$(PY) extract_emb.py
	$(PY) finetune.py --resume auto
	$(PY) distill.py --resume auto
	$(PY) recommend.py --history "Star Wars; Return of the Jedi; Raiders of the Lost Ark" --k 3

test: setup lint
	$(PY) -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

docs: setup
	$(PY) benchmarks/tables.py

records: setup
	$(PY) -m pytest -m records

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

setup:
	@test -x $(PY) || { "$(PYTHON)" $(CHECK) && "$(PYTHON)" -m venv $(VENV); }
	@$(PY) $(CHECK)
	@cmp -s requirements.txt $(VENV)/.slmrec-installed || { \
		echo installing requirements.txt && \
		$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt && \
		cp requirements.txt $(VENV)/.slmrec-installed; }
