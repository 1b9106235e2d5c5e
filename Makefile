# Two commands matter: `make demo` and `make test`. Both create .venv on first use.

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TESTS := $(VENV)/.installed-dev
DOCS := $(VENV)/.installed-docs
# the oldest Triton that pyproject.toml allows, beside the pinned one: it compiles the kernels, too
OLDEST_TRITON := 3.6.0
OLDEST_TRITON_FOLDER := build/triton-$(basename $(OLDEST_TRITON))

.PHONY: demo test lint docs test-demo bench clean

demo: $(INSTALLED)
	$(BIN)/python -m blip2fast.demo

# one process a core, one thread a process
test: $(TESTS) $(OLDEST_TRITON_FOLDER)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m "not demo and not fullsize" tests benchmarks

lint: $(TESTS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(wildcard csrc/*.h csrc/*.cuh csrc/*.cpp csrc/*.cu)

# the pages of docs/ and the reference from docstrings, in build/docs; warnings are errors
docs: $(DOCS)
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/docs

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

$(DOCS): $(INSTALLED)
	sh tools/install.sh $(VENV) ".[docs]"
	touch $@

# there is none but for Linux
$(OLDEST_TRITON_FOLDER): $(OLDEST_TRITON_FOLDER)/.installed
$(OLDEST_TRITON_FOLDER)/.installed: | $(TESTS)
	rm -rf $(@D)
	if [ "$$(uname -s)" = Linux ]; then \
	    $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-deps \
	        --target $(@D) triton==$(OLDEST_TRITON); \
	fi
	mkdir -p $(@D)
	touch $@

clean:
	rm -rf $(VENV) build runs
