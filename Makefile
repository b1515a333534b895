# make demo | test | quick | smoke | lint | bench | faults | clean
# PYTHON= another interpreter, TORCH= another torch build
PYTHON ?= python3
# The release the pages' figures were made with; where it has no wheel, requirements.txt decides.
TORCH  ?= torch==2.13.0
VENV   ?= .venv
RUN    := $(VENV)/bin/python

.PHONY: demo test quick smoke lint bench faults clean

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	-$(RUN) -m pip install --quiet "$(TORCH)"
	$(RUN) -m pip install --quiet -r requirements.txt
	touch $@

# Draws hands, pre-trains and trains on them, scores, predicts: nine minutes on two slow cores.
demo: $(VENV)/installed
	rm -rf out/demo
	PYTHON=$(RUN) bash recipes/laptop.sh out/demo

# Everything. The pages' commands take as long as all other tests, so they run beside them on a second core.
test: $(VENV)/installed
	@pages=$$(mktemp); \
	$(RUN) -m pytest -q tests/test_pages.py >"$$pages" 2>&1 & job=$$!; \
	$(RUN) -m pytest -q tests --ignore tests/test_pages.py; others=$$?; \
	wait $$job; status=$$?; cat "$$pages"; rm "$$pages"; exit $$((status ? status : others))

# Under two minutes: all tests that start no command.
quick: $(VENV)/installed
	$(RUN) -m pytest -q tests -m "not commands"

# Under a minute: every stage two steps on tiny data, also under torchrun; for the CI of others.
smoke: $(VENV)/installed
	PYTHON=$(RUN) bash recipes/smoke.sh out/smoke

lint: $(VENV)/installed
	$(RUN) -m pip install --quiet ruff
	$(RUN) -m ruff check .

# Speed, side by side with what people would use instead (docs/benchmarks.md). Rivals bring no other torch.
bench: $(VENV)/installed
	-$(RUN) -m pip install --quiet "torch==$$($(RUN) -c 'import torch; print(torch.__version__)')" \
	    -r requirements-bench.txt
	$(RUN) tests/benchmark.py --out out/benchmarks.json

# Kills, full disks, damaged files and odd numbers, on purpose: half an hour on two cores (CONTRIBUTING.md).
faults: $(VENV)/installed
	$(RUN) tests/faults.py

clean:
	rm -rf $(VENV) out
