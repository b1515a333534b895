#!/usr/bin/env bash
# bash recipes/laptop.sh [DIR]: draws hands, trains a mesh network from scratch and one from a HandMIM
# encoder, scores both, predicts. About nine minutes on two slow cores. Writes DIR (default out/demo). This is
# `make demo`, which makes an environment first. PYTHON= another interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
out=${1:-out/demo}

upright=(
    --look plain             # the pictures that the figures of the pages were measured on
    --tilt 12                # degrees around upright: what two cores learn in minutes
    --anywhere 0             # no hands seen from anywhere; the default .25 takes far longer
)
"$python" make_synthetic.py --out "$out/train" --hands 8000 --videos 4000 "${upright[@]}"
"$python" make_synthetic.py --out "$out/val" --hands 400 --videos 400 --seed 1 "${upright[@]}"

pretraining=(
    --arch vit_micro         # the smallest ViT
    --image-size 64          # 16 patches, where 224 has 196
    --prototypes 512         # far below the number of hands
    --batch-size 32          # many small batches: a small ViT is slow from scratch
    --align 0.2 --patch-loss 0.1 --pixel-loss 0.3   # HandMIM's three parts teach slowly ...
    --hog 3                  # ... edges teach in minutes (ours)
    --rotation 20            # degrees: the hands are upright
    --color 0.5              # mild, for a short run
    --lr 4e-3                # at batch 256, so 5e-4 at 32
    --ema 0.98               # in 900 steps a slower teacher does not catch up
    --steps 900              # 3.6 times through the hands, three minutes
    --cache memory           # decodes each picture once; both cores then compute
)
"$python" pretrain_mim.py --data "$out/train" --out "$out/mim" "${pretraining[@]}"

mesh=(
    --data "$out/train"
    --val "$out/val"
    --image-size 64          # as in pre-training
    --head-width 64          # channels of the head; 256 is more than toy sizes need
    --iterations 2           # corrections by the head; PyMAF has 3
    --rotation 5             # degrees: the hands are upright
    --zoom 0.91 1.1          # views up to a tenth nearer or further
    --shift 0.05             # of half a view's side
    --color 0.4              # mild, for a short run
    --batch-size 32          # many small batches
    --lr 4e-3                # at batch 256; a small ViT takes a high rate
    --drop-path 0            # the run is too short to overfit
    --dropout 0              # the same
    --ema 0.995              # averages about the last 200 steps
    --steps 1100
    --cache memory
    --eval-every 550
    --save-every 550
)
mkdir -p "$out"
# Side by side, each on half of the cores: small steps gain little from more cores.
cores=$("$python" -c 'from runtime import cores; print(cores())')
export OMP_NUM_THREADS=$(((cores + 1) / 2))
"$python" finetune_mesh.py --out "$out/scratch" --arch vit_micro "${mesh[@]}" >"$out/scratch.log" 2>&1 &
scratch=$!
trap 'kill $scratch 2>/dev/null || true' EXIT
"$python" finetune_mesh.py --out "$out/pretrained" --init "$out/mim/encoder.pt" "${mesh[@]}"
wait $scratch || { cat "$out/scratch.log" >&2; exit 1; }
trap - EXIT
unset OMP_NUM_THREADS

"$python" evaluate.py --data "$out/val" --checkpoint "$out/scratch/last.pt" --out "$out/scratch/evaluation"
"$python" evaluate.py --data "$out/val" --checkpoint "$out/pretrained/last.pt" --out "$out/evaluation"
"$python" predict.py "$out"/val/images/000000{0,1}{0..9}.jpg --boxes "$out/val/boxes.csv" \
    --checkpoint "$out/pretrained/last.pt" --out "$out/predictions"
"$python" evaluate.py --out "$out" --compare \
    "scratch=$out/scratch/evaluation/metrics.json" "pretrained=$out/evaluation/metrics.json"
echo "Look at $out/train/samples.png, $out/mim/samples/, $out/predictions/ and $out/evaluation/report.html"
