#!/usr/bin/env bash
# bash recipes/table_handmim.sh                      the table of docs/handmim.md: five hours on one core
# bash recipes/table_handmim.sh NAME [SWITCH ...]    one row of it, or of docs/experiments.md
# The probe prints its numbers and writes them to runs/table_handmim/NAME.SEED/probe/metrics.json.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
seeds=${SEEDS:-0 1 2}

upright=(--look plain --tilt 12 --anywhere 0)        # what two cores learn in minutes
if [ ! -e hands/easy/index.json ]; then
    "$python" make_synthetic.py --out hands/easy --hands 24000 --videos 8000 "${upright[@]}"
    "$python" make_synthetic.py --out hands/easy_val --hands 3000 --videos 1500 --seed 1 "${upright[@]}"
fi

pretraining=(
    --data hands/easy
    --arch vit_tiny
    --image-size 64
    --prototypes 512         # far below the number of hands
    --batch-size 32          # many small batches
    --lr 4e-3                # at batch 256
    --ema 0.99               # a slower teacher does not catch up
    --steps 750              # once through the hands
)
hog=(                        # HandMIM + HOG: the edges lead, because minutes count
    --hog 3
    --align 0.2
    --patch-loss 0.1
    --pixel-loss 0.3
)
mesh=(
    --data hands/easy
    --val hands/easy_val
    --image-size 64
    --head-width 64
    --iterations 2
    --rotation 5             # the hands are upright
    --zoom 0.91 1.1
    --shift 0.05
    --color 0.4
    --batch-size 32
    --lr 4e-3
    --drop-path 0
    --dropout 0
    --ema 0.995
    --steps 400
)

row() {                      # row NAME [SWITCH ...]: pre-trains and probes, once a seed
    local name=$1 seed run
    shift
    for seed in $seeds; do
        run=runs/table_handmim/$name.$seed
        "$python" pretrain_mim.py --out "$run" --seed "$seed" "${pretraining[@]}" "$@"
        "$python" probe.py "$run/encoder.pt" --data hands/easy_val --train hands/easy --out "$run/probe"
    done
}

train_mesh() {               # train_mesh NAME SEED FLAG ...: trains and scores a mesh network
    local run=runs/table_handmim/mesh_$1.$2
    shift 2
    "$python" finetune_mesh.py --out "$run" "${mesh[@]}" "$@"
    "$python" evaluate.py --data hands/easy_val --checkpoint "$run/last.pt" --out "$run/scores"
}

if [ $# -gt 0 ]; then
    row "$@"
    exit
fi

row handmim
row handmim_hog "${hog[@]}"
row ibot --pose-loss class --pixel-loss 0                               # iBOT's losses
row pixels --pose-loss none --patch-loss 0 --mask-share 1               # masked pixels alone
row patches --pose-loss none --pixel-loss 0                             # masked patches alone
row hog --hog 3 --patch-loss 0 --pixel-loss 0 --align 0                 # HOG alone

scores=()
for seed in $seeds; do
    for labels in 0.1 1; do
        for name in handmim handmim_hog; do
            train_mesh "${name}_$labels" "$seed" --seed "$seed" --label-fraction "$labels" \
                --init "runs/table_handmim/$name.$seed/encoder.pt"
        done
        train_mesh "scratch_$labels" "$seed" --seed "$seed" --label-fraction "$labels" --arch vit_tiny
        for name in "handmim_$labels" "handmim_hog_$labels" "scratch_$labels"; do
            scores+=("$name=runs/table_handmim/mesh_$name.$seed/scores/metrics.json")
        done
    done
done
# Mean and deviation of the seeds.
"$python" evaluate.py --compare "${scores[@]}" --out runs/table_handmim/meshes
