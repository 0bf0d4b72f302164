# `make` alone prints the targets. The first of them to run makes .venv: PYTHON=python3.12 make test chooses whose.
.PHONY: help demo test check bench faults docs serve
RUN := .venv/bin/python
export VIRTUAL_ENV := $(CURDIR)/.venv
export PATH := $(VIRTUAL_ENV)/bin:$(PATH)

help:           ## print this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' Makefile | expand -t 16
demo: .venv/ok  ## train all three stages on the embedded shapes, and show what came out
	@bash scripts/curriculum.sh
test: .venv/ok  ## run the tests
	@$(RUN) -m pytest -n auto --maxprocesses 4 --dist loadfile
check: .venv/ok ## format, lint and types: what CI asks besides the tests
	@ruff format --check . && ruff check . && pyright
bench: .venv/ok ## measure speed, and compare with the numbers in benchmarks/
	@KINETO_LOG_LEVEL=6 $(RUN) benchmarks/run.py # torch's profiler would write into the table
faults: .venv/ok ## kill, fill the disk, flip bits, and see that nothing is lost
	@$(RUN) benchmarks/faults.py
docs: .venv/ok  ## build the site of docs/ into outputs/site
	@NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict
serve: .venv/ok ## the same at http://127.0.0.1:8000, anew at every change
	@NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs serve

.venv/ok: requirements.lock pyproject.toml scripts/setup.sh
	@bash scripts/setup.sh $(PYTHON)
