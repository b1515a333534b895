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

# ---------------------------------------------------------------------------------------------------------------- demo
DEMO  := out/demo
HANDS ?= 4000
SMALL := --arch vit_tiny --image-size 96 --head-width 64

demo: $(VENV)/installed
	rm -rf $(DEMO)
	$(RUN) make_synthetic.py --out $(DEMO)/train --hands $(HANDS) --seed 0
	$(RUN) make_synthetic.py --out $(DEMO)/val --hands 400 --seed 1
	$(RUN) finetune_mesh.py --data $(DEMO)/train --val $(DEMO)/val --out $(DEMO)/scratch $(SMALL) --epochs 6 --batch-size 32 --lr 4e-3 --drop-path 0 --rotation 45
	$(RUN) evaluate.py --data $(DEMO)/val --checkpoint $(DEMO)/scratch/last.pt --out $(DEMO)/evaluation
	$(RUN) predict.py $(DEMO)/val/images/00000[0-9].jpg --checkpoint $(DEMO)/scratch/last.pt --out $(DEMO)/predictions
	$(RUN) evaluate.py --compare scratch=$(DEMO)/evaluation/metrics.json --out $(DEMO)
	@echo "look at  $(DEMO)/train/samples.png  $(DEMO)/scratch/samples/  $(DEMO)/predictions/  $(DEMO)/evaluation/report.html"

bench: $(VENV)/installed
	$(RUN) tests/benchmark.py
