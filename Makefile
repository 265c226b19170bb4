# make demo    environment, the laptop study, its figures and tables     (20 minutes on 2 cores)
# make test    environment, the whole test suite                         (10 minutes on 2 cores)
# make check   lint, types, import contracts                             (1 minute)
# make bench   the benchmarks, quick
.PHONY: demo test check bench clean
.DELETE_ON_ERROR:

BIN := .venv/bin
RUNTIME := .venv/.runtime-ready
DEV := .venv/.dev-ready
STUDY := isoflop_laptop
WORKERS ?= auto

demo: $(RUNTIME)
	$(BIN)/peer-train --config-name $(STUDY)
	$(BIN)/peer-analyze isoflop runs/$(STUDY)

test: $(DEV)
	$(BIN)/pytest -n $(WORKERS)

check: $(DEV)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

bench: $(DEV)
	$(BIN)/python -m benchmarks.layers --quick
	$(BIN)/python -m benchmarks.cost_of_experts --quick
	$(BIN)/python -m benchmarks.step --quick
	$(BIN)/python -m benchmarks.exchange --quick

clean:
	rm -rf .venv build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache

$(RUNTIME): pyproject.toml constraints.txt scripts/setup.sh
	scripts/setup.sh
	touch $@

$(DEV): pyproject.toml constraints.txt scripts/setup.sh
	scripts/setup.sh dev
	touch $@ $(RUNTIME)
