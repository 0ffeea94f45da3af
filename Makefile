# What CONTRIBUTING.md describes. The first target that needs Python makes .venv and installs the project into it: the demo
# what it needs and the server's few packages, everything else also what tests need (a browser driver, DeepSpeed, pytest).
PYTHON ?= python3
BIN := .venv/bin
DEMO := .venv/.demo
DEV := .venv/.dev

.PHONY: demo test test-all lint bench bench-gpu clean

demo: $(DEMO)
	rm -rf runs/demo
	@$(BIN)/dvi model get smollm2-135m-instruct; case $$? in \
		0) $(BIN)/dvi train configs/demo/demo.yaml ;; \
		2) echo "going on with the bundled model, which is small and wrong about most facts" >&2; \
			$(BIN)/dvi train configs/demo/bundled.yaml ;; \
		*) exit 1 ;; \
	esac

# Two at a time: the tests are held to one thread each.
test: $(DEV)
	$(BIN)/pytest -n 2

test-all: $(DEV)
	$(BIN)/pytest -m ""

lint: $(DEV)
	$(BIN)/ruff check .

bench: $(DEV)
	$(BIN)/python scripts/bench.py
	$(BIN)/python scripts/bench_serving.py
	$(BIN)/dvi bench spec-bench --model checkpoints/reference-11m --adapter checkpoints/reference-11m-drafter \
		--output runs/spec-bench-rivals --limit 10 --max-new-tokens 64 --rivals all --modes frozen,online

bench-gpu: $(DEV)
	$(BIN)/python scripts/gpu_check.py

clean:
	rm -rf runs build .pytest_cache .ruff_cache .hypothesis *.egg-info
	find dvi trainers scripts tests -name __pycache__ -prune -exec rm -rf {} +

# DeepSpeed comes as a source archive of pure Python: seconds, and no compiler, since nothing it would compile is used.
$(DEMO): EXTRA := serve
$(DEV): EXTRA := dev
$(DEMO) $(DEV): pyproject.toml constraints.txt
	@echo "installing into .venv with $(PYTHON) (minutes the first time)"
	@{ $(PYTHON) -m venv .venv && $(BIN)/pip install --quiet --disable-pip-version-check -e ".[$(EXTRA)]" -c constraints.txt; } \
		|| { echo "could not install into .venv: see above; it needs Python 3.11 or newer and a package index" >&2; exit 1; }
	@touch $(DEMO) $@
