# make demo    environment, the laptop study, its figures and tables     (20 minutes on 2 cores)
# make test    environment, the whole test suite                         (25 minutes on 2 cores)
# make check   lint, types, import contracts                             (1 minute)
# make bench   the benchmarks, quick
# make faults  all faults that docs/reliability.md lists, injected; the scorecard (45 minutes on 2 cores)
.PHONY: demo test check bench faults clean
.DELETE_ON_ERROR:

BIN := .venv/bin
RUNTIME := .venv/.runtime-ready
DEV := .venv/.dev-ready
STUDY := isoflop_laptop
SCORECARD := $(CURDIR)/.pytest_cache/scorecard.jsonl
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
	$(BIN)/python -m benchmarks.checkpointing --quick
	$(BIN)/python -m benchmarks.exchange --quick
	$(BIN)/python -m benchmarks.fits --quick
	$(BIN)/python -m benchmarks.adaptive --quick
	$(BIN)/python -m benchmarks.study --quick

faults: $(DEV)
	mkdir -p $(dir $(SCORECARD)) && rm -f $(SCORECARD)
	PEER_SCALING_FAULTS=full PEER_SCALING_SCORECARD=$(SCORECARD) $(BIN)/pytest -n $(WORKERS) tests/faults; \
	    failed=$$?; $(BIN)/python scripts/scorecard.py $(SCORECARD) && exit $$failed

clean:
	rm -rf .venv build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache

$(RUNTIME): pyproject.toml constraints.txt scripts/setup.sh
	scripts/setup.sh
	touch $@

$(DEV): pyproject.toml constraints.txt scripts/setup.sh
	scripts/setup.sh dev
	touch $@ $(RUNTIME)
