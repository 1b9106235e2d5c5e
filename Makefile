# Two commands matter: `make demo` and `make test`. Both create .venv on first use.

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TESTS := $(VENV)/.installed-dev

.PHONY: demo test lint test-demo bench clean

demo: $(INSTALLED)
	$(BIN)/python -m blip2fast.demo

# one process a core, one thread a process
test: $(TESTS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m "not demo and not fullsize" tests benchmarks

lint: $(TESTS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(wildcard csrc/*.h csrc/*.cuh csrc/*.cpp csrc/*.cu)

# the demo in a fresh clone and a fresh environment, held to its gates
test-demo: $(TESTS)
	$(BIN)/python -m pytest -m demo -s tests

bench: $(TESTS)
	$(BIN)/python -m pytest benchmarks/ --benchmark-only

$(INSTALLED): pyproject.toml constraints.txt tools/install.sh
	sh tools/install.sh $(VENV) ".[demo]"
	touch $@

$(TESTS): $(INSTALLED)
	sh tools/install.sh $(VENV) ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build runs
