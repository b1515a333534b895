#!/usr/bin/env bash
# bash recipes/laptop.sh: draws hands, pre-trains on them, trains a mesh network, scores it.
# About ten minutes on two cores. `make demo` runs the same and also trains from scratch, for comparison.
# First enter the environment that `make demo` made: source .venv/bin/activate
set -euo pipefail
cd "$(dirname "$0")/.."

upright=(
    --tilt 12                # degrees around upright: what two cores learn in minutes
    --anywhere 0             # no hands seen from anywhere; the default .25 takes far longer
)
python make_synthetic.py --out hands/train --hands 8000 --videos 4000 "${upright[@]}"
python make_synthetic.py --out hands/val --hands 400 --videos 400 --seed 1 "${upright[@]}"

pretraining=(
    --arch vit_micro         # the smallest ViT
    --image-size 64          # a sixteenth of the patches of 256
    --prototypes 512         # far below the number of hands
    --batch-size 32          # many small batches: a small ViT is slow from scratch
    --lr 4e-3                # at batch 256, so 5e-4 at 32
    --ema 0.99               # in 900 steps a slower teacher does not catch up
    --steps 900              # about 3.6 passes over the hands, three minutes
)
python pretrain_mim.py --data hands/train --out runs/mim_micro "${pretraining[@]}"

mesh=(
    --init runs/mim_micro/encoder.pt
    --image-size 64
    --head-width 64          # the paper's 256 is more than toy sizes need
    --iterations 2           # feedback of the head; the paper has 3
    --rotation 5             # the hands are upright
    --zoom 0.91 1.1          # a tenth smaller or larger
    --shift 0.05             # of half the view's side
    --color 0.4              # mild: drawn hands have few colours
    --batch-size 32
    --lr 4e-3                # at batch 256; a small ViT takes a high rate
    --drop-path 0            # the run is too short to overfit
    --dropout 0              # the same
    --ema 0.995              # averages the last 200 steps
    --steps 1200
)
python finetune_mesh.py --data hands/train --val hands/val --out runs/mesh "${mesh[@]}"
python evaluate.py --data hands/val --checkpoint runs/mesh/last.pt --out runs/mesh/val
