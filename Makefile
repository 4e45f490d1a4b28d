# Every target sets up what it needs first. Python 3.11, make and a package index are enough.
PYTHON ?= python3.11
BIN := .venv/bin
PROFILE ?= laptop

.PHONY: setup serve stop demo check test test-all lock

setup: .venv/.ready

.venv/.ready: requirements.lock pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps -r requirements.lock
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

tests/node/node_modules/.ready: tests/node/package-lock.json
	@if command -v npm >/dev/null; then npm ci --no-audit --no-fund --prefix tests/node && touch $@ || echo "npm ci failed: no Node client"; \
	else echo "npm is not here: the tests of the Node client are skipped"; fi

serve: setup  ## starts Ray and the Serve graph in the foreground; prints "ready" and three curl lines
	@$(BIN)/python -m serve.main --profile $(PROFILE)

stop: setup  ## ends the graph that `make serve` started
	@$(BIN)/python -m serve.stop

demo: setup  ## a guided tour against the running graph
	@$(BIN)/python -m serve.demo

check: setup  ## lint, format, types, import rule
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/basedpyright

test: check tests/node/node_modules/.ready  ## what .ci/run calls; under 20 minutes on two cores
	$(BIN)/python -m pytest -m "not soak and not gpu" -n 2 --dist loadfile tests/unit
	$(BIN)/python -m pytest -m "not soak and not gpu" --ignore tests/unit

test-all: check tests/node/node_modules/.ready  ## repeats, storms and soaks too
	$(BIN)/python -m pytest -m "not gpu"

lock:  ## writes requirements.lock from what is installed in .venv
	$(BIN)/python -m pip freeze --exclude-editable --all | grep -v -E '^pip==' | sed 's,+cpu,,' > requirements.lock
