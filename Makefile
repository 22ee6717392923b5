# Each target sets up what it needs: Python 3.11 or newer, make and a C++ compiler are enough.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
SOURCES := pyproject.toml CMakeLists.txt constraints.txt README.md \
	$(shell find csrc python/moeyard -type f -not -name '*.so' -not -name '*.pyc' 2>/dev/null)
NATIVE_SOURCES = $$(git ls-files 'csrc/*.cpp' 'csrc/*.hpp' 'csrc/*.cu' 'csrc/*.cuh' 'tests/native/*.cpp' 'tests/native/*.cu')

.PHONY: demo test test-full test-simd test-cuda sanitize lint format bench bench-quick wheel smoke native clean help

help:
	@echo "make demo       train a small MoE structure encoder on embedded molecules (about 2 minutes)"
	@echo "make test       the test suite (up to 15 minutes)"
	@echo "make test-full  also the slow kinds: mutants of the CUDA kernels, 10,000 cases of each op"
	@echo "make test-simd  the op tests on the SIMD levels below this machine's best (make test runs the best)"
	@echo "make test-cuda  the CUDA kernels on this CPU: 13,000 cases beside the CPU's, then sanitizers"
	@echo "make sanitize   op tests and 100,000 hostile calls under AddressSanitizer and UBSan; ThreadSanitizer (Linux, gcc)"
	@echo "make lint       ruff, mypy, clang-format"
	@echo "make bench      every op and the MoE layer beside peers, into benchmarks/results and the README (20 to 35 minutes)"
	@echo "make bench-quick  the ops with smaller sizes and fewer rounds (3 minutes), nothing recorded"
	@echo "make wheel      a wheel and an sdist in dist/"
	@echo "make smoke      install the wheel into a fresh environment elsewhere and try it there"
	@echo "make native     build the native modules into the source tree, for development"

demo: $(VENV)/demo.stamp
	$(BIN)/moeyard demo

# torch's OpenMP threads sleep instead of spinning: half as fast alone, ten times faster on a busy machine.
test test-full test-simd test-cuda: export OMP_WAIT_POLICY ?= PASSIVE

# The CUDA kernels beside the CPU's, in random cases: MOEYARD_EXAMPLES times as many as the test suite has.
CASES := $(BIN)/python -m pytest -m "not slow" -k "agree or any_call" -n 2 --dist worksteal
GATING := $(foreach op,topk_gating permute_tokens,tests/ops/test_$(op)_engines.py)
STRUCTURES := $(foreach op,radius_graph pack_batches gather_segments,tests/ops/test_$(op)_engines.py)

test: $(VENV)/test.stamp
	$(BIN)/python -m pytest tests -m "not slow" -n 2

test-full: test
	$(BIN)/python -m pytest tests -m slow
	MOEYARD_EXAMPLES=84 $(CASES) $(STRUCTURES) --timeout 7200

test-simd: $(VENV)/test.stamp
	bash .ci/on-each-simd-level $(BIN)/python --below-best $(BIN)/python -m pytest tests/ops -m "not slow" -k "not emulated" -n 2

test-cuda: $(VENV)/test.stamp
	MOEYARD_EXAMPLES=10 $(CASES) $(GATING) --timeout 1200
	MOEYARD_EXAMPLES=3 $(CASES) $(STRUCTURES)
	bash .ci/sanitize $(abspath $(BIN)/python) emulation

sanitize: $(VENV)/test.stamp
	bash .ci/sanitize $(abspath $(BIN)/python)

lint: $(VENV)/test.stamp
	$(PIP) install -c constraints.txt ruff mypy clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(NATIVE_SOURCES)

format: $(VENV)/test.stamp
	$(PIP) install -c constraints.txt ruff clang-format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE_SOURCES)

BENCH := $(BIN)/python -m pytest benchmarks -q -o python_files="bench_*.py" -o python_functions="bench_*" -o timeout=1800

bench: $(VENV)/bench.stamp
	$(BENCH) --rows benchmarks/results; status=$$?; $(BIN)/python benchmarks/report.py && exit $$status

bench-quick: $(VENV)/bench.stamp
	$(BENCH) --quick --rows build/bench-quick --ignore benchmarks/bench_moe.py

wheel: $(VENV)/wheel.stamp

smoke: wheel
	bash .ci/smoke dist $(PYTHON)

native: $(VENV)/test.stamp
	$(BIN)/cmake -G Ninja -S . -B build/dev -DMOEYARD_IN_TREE=ON -DPython_EXECUTABLE=$(abspath $(BIN)/python)
	$(BIN)/cmake --build build/dev

$(VENV)/base.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than 3.11: call make with PYTHON=/path/to/python3.11 (or newer)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	touch $@

# One build serves the tests, the benchmarks and the smoke test: what they see is what people install.
$(VENV)/wheel.stamp: $(VENV)/base.stamp $(SOURCES)
	$(PIP) install -c constraints.txt build
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	touch $@

# pip takes a wheel of the same version for the same wheel: the second line puts the new one in.
INSTALL_WHEEL = $(PIP) install -c constraints.txt "$$(ls dist/*.whl)[$(EXTRAS)]" && \
	$(PIP) install --no-deps --force-reinstall dist/*.whl

$(VENV)/demo.stamp: $(VENV)/base.stamp $(SOURCES)
	$(PIP) install -c constraints.txt ".[cli,train,structures]"
	touch $@

$(VENV)/test.stamp: EXTRAS := all,test
$(VENV)/test.stamp: $(VENV)/wheel.stamp
	$(INSTALL_WHEEL)
	touch $@

# Setting up includes building torch_cluster from source: some minutes, once.
$(VENV)/bench.stamp: EXTRAS := bench
$(VENV)/bench.stamp: $(VENV)/wheel.stamp benchmarks/peers.sh
	$(INSTALL_WHEEL)
	bash benchmarks/peers.sh $(BIN)/python
	touch $@

clean:
	rm -rf $(VENV) build dist
