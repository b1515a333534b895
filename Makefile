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
# Upright hands and a small network: what two cores can learn in minutes; views from anywhere take many times longer.
DEMO  := out/demo
EASY  := --tilt 12 --anywhere 0
SMALL := --image-size 64 --head-width 64 --iterations 2
VIEWS := --rotation 5 --zoom 0.1 --shift 0.05 --color 0.15
TRAIN := --batch-size 32 --lr 4e-3 --drop-path 0 --dropout 0 --ema 0.995 --steps 1200 --eval-every 600 --save-every 600
MIM   := --arch vit_micro --image-size 64 --prototypes 512 --head-width 512 --batch-size 32 --lr 4e-3 --ema 0.99 --steps 900

demo: $(VENV)/installed
	rm -rf $(DEMO)
	$(RUN) make_synthetic.py --out $(DEMO)/train --hands 8000 --videos 4000 $(EASY)
	$(RUN) make_synthetic.py --out $(DEMO)/val --hands 400 --videos 400 --seed 1 $(EASY)
	$(RUN) pretrain_mim.py --data $(DEMO)/train --out $(DEMO)/mim $(MIM)
	$(RUN) finetune_mesh.py --data $(DEMO)/train --val $(DEMO)/val --out $(DEMO)/scratch --arch vit_micro $(SMALL) $(VIEWS) $(TRAIN)
	$(RUN) finetune_mesh.py --data $(DEMO)/train --val $(DEMO)/val --out $(DEMO)/pretrained --init $(DEMO)/mim/encoder.pt $(SMALL) $(VIEWS) $(TRAIN)
	$(RUN) evaluate.py --data $(DEMO)/val --checkpoint $(DEMO)/scratch/last.pt --out $(DEMO)/scratch/evaluation
	$(RUN) evaluate.py --data $(DEMO)/val --checkpoint $(DEMO)/pretrained/last.pt --out $(DEMO)/evaluation
	$(RUN) predict.py $(DEMO)/val/images/000000[0-1]?.jpg --boxes $(DEMO)/val/boxes.csv --checkpoint $(DEMO)/pretrained/last.pt --out $(DEMO)/predictions
	$(RUN) evaluate.py --compare scratch=$(DEMO)/scratch/evaluation/metrics.json pretrained=$(DEMO)/evaluation/metrics.json --out $(DEMO)
	@echo "Look at $(DEMO)/train/samples.png, $(DEMO)/mim/samples/, $(DEMO)/predictions/ (.png, .obj) and $(DEMO)/evaluation/report.html"

bench: $(VENV)/installed
	$(RUN) tests/benchmark.py
