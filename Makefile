# Two commands matter: `make demo` and `make test`. Both create .venv when it is missing.
PYTHON ?= python3
PIP_ARGS ?=
BIN := .venv/bin
INSTALLED := .venv/.installed
MODELS := demo_app/shared/models

.PHONY: demo test lint bench clean

demo: $(INSTALLED)  ## export the shipped model to all three targets, verify and time it
	$(BIN)/edgefuse export $(MODELS)/fusionformer-tiny --all --baseline $(MODELS)/conformer-tiny --overwrite -o out/fusionformer-tiny

test: lint  ## what CI runs
	$(BIN)/python -m pytest

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(INSTALLED)  ## the latency ratios of README.md
	$(BIN)/edgefuse ablation --preset small --seconds 5.12 --chunk-ms 640 --target executorch --target tflite
	$(BIN)/edgefuse ablation --preset base --precision int8 --seconds 5.12 --target executorch --target tflite

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt $(PIP_ARGS) --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv out
