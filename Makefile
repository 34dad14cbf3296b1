# `make demo` and `make test` do all the set-up on a fresh machine that has Python 3.11+ (with venv) and a C++17 compiler.

PYTHON ?= python3
VENV   ?= .venv
PY     := $(VENV)/bin/python
OUT    ?= out/demo
# On a machine without an NVIDIA GPU torch has to be the CPU build. Point pip at an index or folder that offers it with pip's
# own variables (PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS), or name the build here.
TORCH  ?= torch>=2.11,<2.14

BUILD_INPUTS := pyproject.toml CMakeLists.txt $(wildcard csrc/*.cpp csrc/*.h)

.PHONY: demo test lint test-slow test-asan readme-table demo-bundle clean

demo: $(VENV)/.runtime
	$(PY) -P -m lada_rt_export.demo.showcase --out $(OUT)

test: $(VENV)/.test lint
	$(PY) -P -m pytest -q

lint: $(VENV)/.test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# The C++ kernels under AddressSanitizer and UBSan.
test-asan:
	tests/csrc/run.sh build/asan

# Every stage at the released sizes, random weights, against torch: an hour on two cores, 13 GB of memory, 30 GB of disk.
test-slow: $(VENV)/.test
	$(PY) -P bench/full_size.py

# Write the README's table from the committed results.
readme-table: $(VENV)/.test
	$(PY) -P bench/readme_table.py

# Rebuild the embedded demo bundle after a change of the models or the exporter.
demo-bundle: $(VENV)/.test
	$(VENV)/bin/lada-rt build-engine --demo --out runtime/lada_rt/demo.bundle

clean:
	rm -rf build dist out .pytest_cache .mypy_cache .ruff_cache

$(PY):
	$(PYTHON) -m venv $(VENV)

$(VENV)/.runtime: $(PY) $(BUILD_INPUTS)
	$(PY) -m pip install --quiet --disable-pip-version-check -e ".[cpu,bench]"
	touch $@

$(VENV)/.test: $(VENV)/.torch $(BUILD_INPUTS)
	$(PY) -m pip install --quiet --disable-pip-version-check -e ".[test]"
	touch $@ $(VENV)/.runtime

# Look before installing: a CUDA build of torch is gigabytes that a machine without a GPU cannot use.
$(VENV)/.torch: $(PY)
	@if [ ! -e /proc/driver/nvidia/version ] && $(PY) -m pip install --quiet --disable-pip-version-check --dry-run --report - "$(TORCH)" \
	    | grep -q '"name": *"nvidia-'; then \
	  echo 'make: "$(TORCH)" resolves to a CUDA build, but this machine has no NVIDIA driver.' >&2; \
	  echo 'make: offer pip a CPU build (PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS; see "Get Started" on pytorch.org) and try again.' >&2; \
	  exit 1; \
	fi
	$(PY) -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	touch $@
