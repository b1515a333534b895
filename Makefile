# make demo | make test | make lint | make bench      PYTHON= another interpreter, TORCH= another torch build
PYTHON ?= python3
# The release the README's figures were made with; where it has no wheel, requirements.txt decides.
TORCH  ?= torch==2.13.0
VENV   ?= .venv
RUN    := $(VENV)/bin/python

.PHONY: demo test lint bench clean

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	-$(RUN) -m pip install --quiet "$(TORCH)"
	$(RUN) -m pip install --quiet -r requirements.txt
	touch $@

test: $(VENV)/installed
	$(RUN) -m pytest -q tests

lint: $(VENV)/installed
	$(RUN) -m pip install --quiet ruff
	$(RUN) -m ruff check .

clean:
	rm -rf $(VENV) out
