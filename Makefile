# Two commands matter: `make demo` and `make test`. Both create .venv when it is missing.
PYTHON ?= python3
PIP_ARGS ?=
PYTEST_ARGS ?=
BIN := .venv/bin
INSTALLED := .venv/.installed
MODELS := demo_app/shared/models
BUNDLES := out/bundles
CORPUS ?= out/corpus
IN_PARALLEL = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal
SHAPES := --target executorch --target tflite --seconds 5.12 --chunk-ms 640

.PHONY: demo test slow lint bench study field budget packages clean

demo: $(INSTALLED)  ## export the shipped model to all three targets, verify and time it
	$(BIN)/edgefuse export $(MODELS)/fusionformer-tiny --all --baseline $(MODELS)/conformer-tiny --overwrite -o out/fusionformer-tiny

test: lint  ## what CI runs
	$(IN_PARALLEL)

slow: $(INSTALLED)  ## tests of single exports that take minutes
	$(IN_PARALLEL) -m slow

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(INSTALLED)  ## the latency ratios of the architecture in README.md
	$(BIN)/edgefuse ablation --preset small --seconds 5.12 --chunk-ms 640 --target executorch --target tflite
	$(BIN)/edgefuse ablation --preset base --precision int8 --seconds 5.12 --target executorch --target tflite

study: $(INSTALLED)  ## train every idea of the papers on CORPUS and write STUDY.md; hours on a CPU, and goes on where it was interrupted
	$(BIN)/edgefuse study --speech $(CORPUS) -o out/study
	$(BIN)/edgefuse study --latency -o out/study
	cp out/study/results.json edgefuse/study/results.json
	cp out/study/STUDY.md STUDY.md

field: $(BUNDLES)/.made  ## tests with emulators, boards and a browser; they need `make packages`, and say so where something is missing
	EDGEFUSE_BUNDLES=$(BUNDLES) $(BIN)/python -m pytest -m field tests/field $(PYTEST_ARGS)

budget: $(BUNDLES)/.made  ## the exact instruction counts of the shipped model, held against budgets.toml
	$(BIN)/edgefuse devices setup arm64
	$(BIN)/edgefuse bench $(BUNDLES)/fusionformer-tiny $(BUNDLES)/fusionformer-tiny-int8 --device arm64:cortex-a53 --device arm64:cortex-a76 \
		--processes 1 --latency-only --budget budgets.toml --overwrite -o out/budget.jsonl

$(BUNDLES)/.made: $(INSTALLED)
	$(BIN)/edgefuse export $(MODELS)/fusionformer-tiny $(SHAPES) --overwrite -o $(BUNDLES)/fusionformer-tiny
	$(BIN)/edgefuse export $(MODELS)/fusionformer-tiny $(SHAPES) --precision int8 --calibration demo_app/shared/calibration \
		--overwrite -o $(BUNDLES)/fusionformer-tiny-int8
	touch $@

packages:  ## Debian's emulators, cross compiler, adb and browser: for `make field` and `make budget`; a Node.js that is there stays
	apt-get update -q
	apt-get install -y -q --no-install-recommends \
		$$(if command -v npm > /dev/null; then grep -vx -e nodejs -e npm tests/field/packages.txt; else cat tests/field/packages.txt; fi)

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt $(PIP_ARGS) --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv out
