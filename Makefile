# Everything here needs Python 3.10 or newer and nothing else; it is installed into .venv.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt
RUNTIME := $(VENV)/.runtime
TOOLS := $(VENV)/.tools

# glibc returns large blocks to the system at once and pays for it at every convolution; let it keep them.
export MALLOC_MMAP_THRESHOLD_ ?= 4294967296
export MALLOC_TRIM_THRESHOLD_ ?= 4294967296

.PHONY: demo test bench lint clean

demo: $(RUNTIME)
	$(PY) -m flux demo --out out/demo

# Two processes of one thread each: most tests are too small for two threads.
test: $(TOOLS)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile

bench: $(TOOLS)
	$(PY) -m benchmarks

lint: $(TOOLS)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# torch first and alone: what follows must find it and leave it as it is.
$(RUNTIME): constraints.txt requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -r requirements.txt
	touch $@

$(TOOLS): $(RUNTIME) requirements-dev.txt
	$(PIP) -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV) out
