HOST   ?= 127.0.0.1
PORT   ?= 8080
PYTHON ?= python3
# Further options, for example `make serve ARGS=--verbose` or `make test ARGS="tests/guard -x"`.
ARGS   ?=

PY := .venv/bin/python

.DEFAULT_GOAL := help
.PHONY: help env serve test fuzz lint format bench bundle detection sequence-results locate patch-results compat dist sbom dashboards clean tune-results redteam audit

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

env:  ## make or complete the environment in .venv
	@$(PYTHON) scripts/bootstrap.py

serve: env  ## start a guarded endpoint on HOST:PORT (127.0.0.1:8080)
	@exec $(PY) -m guard.serve --host $(HOST) --port $(PORT) $(ARGS)

test: env  ## run the whole suite; ARGS="-n 2 --dist loadfile" for two files at a time
	OMP_NUM_THREADS=1 $(PY) -m pytest --durations=15 $(ARGS)

fuzz: env  ## look for inputs that break the decoders, a minute each; needs the extra fuzz
	OMP_NUM_THREADS=1 $(PY) -m tests.fuzz $(ARGS)

lint: env  ## check format, style and types
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(PY) -m deploy.dashboards --check
	.venv/bin/hadolint Dockerfile

format: env  ## rewrite files in the project's format
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

bench: env  ## measure what the guard costs beside plain vLLM
	$(PY) -m loadtests.bench $(ARGS)

bundle: env  ## fit and evaluate the lab model's bundle anew; NEURONGUARD_DATA names the data folder
	$(PY) -m models.recipe.bundle $(ARGS)

detection: env  ## measure the lab guard by the whole protocol; NEURONGUARD_DATA names the data folder
	$(PY) -m models.recipe.detection $(ARGS)

sequence-results: env  ## measure sequence probes beside the lab guard; NEURONGUARD_DATA names the data folder
	$(PY) -m models.recipe.sequence $(ARGS)

redteam: env  ## attack the lab guard, refit it, attack it again; NEURONGUARD_DATA names the data folder
	$(PY) -m loadtests.redteam $(ARGS)

locate: env  ## run the four methods on the lab twins anew; NEURONGUARD_DATA names the data folder
	$(PY) -m models.recipe.locate $(ARGS)

tune-results: env  ## measure what tuning by units does to the lab models; NEURONGUARD_DATA names the data folder
	$(PY) -m models.recipe.tuning $(ARGS)

patch-results: env  ## measure what patches do to the lab twins; NEURONGUARD_DATA names the data folder
	$(PY) -m models.recipe.patching $(ARGS)

compat: env  ## run the engine's tests on every version of vLLM; ARGS=0.30 for one, ARGS=--signatures for none
	$(PY) scripts/compat.py $(ARGS)

dist: env  ## build wheel, source archive and chart into dist
	$(PY) -m build --no-isolation --outdir dist .
	.venv/bin/helm package deploy/helm --destination dist

sbom: env  ## list what the images are made of, as CycloneDX, into dist; ARGS=engine for the engine's
	$(PY) scripts/sbom.py $(ARGS)

audit: env  ## ask for known vulnerabilities of what is installed; needs pip-audit and a network
	$(PY) scripts/audit.py

dashboards: env  ## write Grafana's dashboards anew from deploy/dashboards
	$(PY) -m deploy.dashboards

clean:  ## remove caches and build products, and keep .venv
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
