# What CONTRIBUTING.md describes. The first target that needs Python makes .venv and installs the project into it.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo test test-all lint bench bench-gpu clean

demo: $(STAMP)
	rm -rf runs/demo
	$(BIN)/dvi train configs/demo/demo.yaml

# Two at a time: the tests are held to one thread each.
test: $(STAMP)
	$(BIN)/pytest -n 2

test-all: $(STAMP)
	$(BIN)/pytest -m ""

lint: $(STAMP)
	$(BIN)/ruff check .

bench: $(STAMP)
	$(BIN)/python scripts/bench.py
	$(BIN)/python scripts/bench_serving.py
	$(BIN)/dvi bench spec-bench --model checkpoints/reference-11m --adapter checkpoints/reference-11m-drafter \
		--output runs/spec-bench-rivals --limit 10 --max-new-tokens 64 --rivals all --modes frozen,online

bench-gpu: $(STAMP)
	$(BIN)/python scripts/bench_gpu.py

clean:
	rm -rf runs build .pytest_cache .ruff_cache .hypothesis *.egg-info
	find dvi trainers scripts tests -name __pycache__ -prune -exec rm -rf {} +

# DeepSpeed comes as a source archive of pure Python: seconds, and no compiler, since nothing it would compile is used.
$(STAMP): pyproject.toml constraints.txt
	@echo "installing into .venv with $(PYTHON) (minutes the first time)"
	@{ $(PYTHON) -m venv .venv && $(BIN)/pip install --quiet --disable-pip-version-check -e ".[dev]" -c constraints.txt; } \
		|| { echo "could not install into .venv: see above; it needs Python 3.11 or newer and a package index" >&2; exit 1; }
	@touch $@
