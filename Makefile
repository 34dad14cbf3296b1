# `make demo` and `make test` do all the set-up on a fresh machine with Python 3.11+ (with venv) and a C++ compiler.
PYTHON ?= python3
VENV   ?= .venv
PY     := $(VENV)/bin/python
# On a CPU machine torch has to be the CPU build. Point pip at one with its own variables (PIP_INDEX_URL, PIP_FIND_LINKS)
# or name it here; the guard below stops before gigabytes of CUDA packages arrive on a machine without an NVIDIA driver.
TORCH  ?= torch>=2.11,<2.14
