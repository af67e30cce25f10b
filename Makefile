# `make demo` and `make test` need Python >= 3.11 and nothing else; everything is installed into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
TEST_ARGS ?=
# Processes that share the tests of `make test` and `make test-peers`, each file going to one of them.
TEST_WORKERS ?= 2
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-peers test-long lint docs sanitize clean

# One stamp for each set of extras, made again when what is to be installed changes.
$(VENV)/base.stamp: pyproject.toml constraints.txt
	@test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(INSTALL) --editable .
	@touch $@

$(VENV)/serve.stamp: $(VENV)/base.stamp
	$(INSTALL) --editable '.[serve]'
	@touch $@

$(VENV)/test.stamp: $(VENV)/base.stamp
	$(INSTALL) --editable '.[test]'
	@touch $@

$(VENV)/lint.stamp: $(VENV)/base.stamp
	$(INSTALL) --editable '.[lint]'
	@touch $@

# torch first and by exact version: a range would bring the CUDA build with gigabytes of libraries.
$(VENV)/peers.stamp: $(VENV)/test.stamp
	$(INSTALL) torch==2.13.0
	$(INSTALL) --editable '.[test,peers]'
	@touch $@

demo: $(VENV)/serve.stamp
	$(BIN)/mesh-transformer demo $(ARGS)

test: $(VENV)/test.stamp
	$(BIN)/python -m pytest -m "not peers and not long" --numprocesses $(TEST_WORKERS) --dist loadfile \
		--no-loadscope-reorder $(TEST_ARGS)

# Passive: threads of torch that wait would otherwise take the processor from the other worker.
test-peers: $(VENV)/peers.stamp
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -m "peers and not long" --numprocesses $(TEST_WORKERS) --dist loadfile $(TEST_ARGS)

test-long: $(VENV)/peers.stamp
	$(BIN)/python -m pytest -m long $(TEST_ARGS)

lint: $(VENV)/lint.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/docs.stamp: $(VENV)/base.stamp
	$(INSTALL) --editable '.[docs]'
	@touch $@

# build/docs/index.html: docs/ and the reference of the Python code. A warning, such as a link to nowhere, is an error.
docs: $(VENV)/docs.stamp
	JAX_PLATFORMS=cpu $(BIN)/python -m sphinx -E -q --fail-on-warning --keep-going -b html -d build/docs-doctrees docs build/docs

# The native extension's kernels under AddressSanitizer and UndefinedBehaviorSanitizer; needs cmake and a C++ compiler.
sanitize:
	cmake -S . -B build/sanitize -DMESH_TRANSFORMER_SANITIZE=ON -DCMAKE_BUILD_TYPE=Debug
	cmake --build build/sanitize --parallel 2
	build/sanitize/native_sanitize

clean:
	rm -rf $(VENV) build
