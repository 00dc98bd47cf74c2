# `make demo` and `make test` set up everything by themselves, in .venv, from pinned versions.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test mergekit lint test-long bench assets chromium picture clean

demo: $(STAMP)
	$(RUN)/python -m sterna.demo.assets
	$(RUN)/sterna demo

test: $(STAMP) assets chromium lint
	$(RUN)/python -m pytest --numprocesses=auto --maxprocesses=4 --dist=worksteal

# Longer than the default suite: memory of a large checkpoint, more fuzzing.
test-long: $(STAMP) assets
	STERNA_FUZZ=1000000 $(RUN)/python -m pytest -m "slow or not slow"

# The peer of merging, in an environment of its own: it wants other versions, and its licence is not ours.
mergekit:
	$(PYTHON) -m venv .venv-mergekit
	.venv-mergekit/bin/python -m pip install --quiet torch==2.13.0 mergekit==0.1.5

lint: $(STAMP)
	$(RUN)/ruff check .
	$(RUN)/mypy

bench: $(STAMP)
	$(RUN)/python -m sterna.demo.assets --all
	$(RUN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	$(RUN)/python benchmarks/run.py

# The browser that the report's page is tested in. Where it is missing and cannot be installed, those tests are skipped and say so.
chromium:
	@{ { command -v chromium || command -v google-chrome; } >/dev/null && fc-list :lang=ja | grep -q .; } || \
	{ command -v apt-get >/dev/null && { [ "$$(id -u)" = 0 ] || sudo -n true 2>/dev/null; } && \
	  $$([ "$$(id -u)" = 0 ] || echo sudo -n) sh -c 'apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium fonts-noto-cjk >/dev/null'; } || \
	echo "no Chromium here, and it cannot be installed: the browser tests will be skipped"

# The README's picture of a report: of the page that `make demo` wrote, or of PAGE=run/report.html.
picture: chromium
	$(RUN)/python benchmarks/picture.py docs/report.png $(PAGE)

assets: $(STAMP)
	$(RUN)/python -m sterna.demo.assets

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --constraint constraints.txt --upgrade pip torch
	$(RUN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo,train,dev]'
	touch $(STAMP)

clean:
	rm -rf $(VENV)
