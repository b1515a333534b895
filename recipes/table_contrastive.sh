#!/usr/bin/env bash
# bash recipes/table_contrastive.sh                    the table of docs/contrastive.md: two hours on one core
# bash recipes/table_contrastive.sh NAME [SWITCH ...]   one row of it, or of docs/experiments.md
# The probe prints its numbers and writes them to runs/table_contrastive/NAME.SEED/probe/metrics.json.
# PAIRS= (empty) lets SimCLR and PeCLR draw from all hands, not from those that have a neighbour alone.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
seeds=${SEEDS:-0 1 2}

upright=(--look plain --tilt 12 --anywhere 0)        # what two cores learn in minutes
if [ ! -e hands/easy/index.json ]; then
    "$python" make_synthetic.py --out hands/easy --hands 24000 --videos 8000 "${upright[@]}"
    "$python" make_synthetic.py --out hands/easy_val --hands 3000 --videos 1500 --seed 1 "${upright[@]}"
fi
if [ ! -e hands/easy_pairs/pairs.npz ]; then
    "$python" mine_pairs.py --data hands/easy --out hands/easy_pairs/pairs.npz
fi

pairs=${PAIRS-hands/easy_pairs/pairs.npz}             # all methods draw the hands that have a neighbour
pretraining=(
    --data hands/easy
    ${pairs:+--pairs "$pairs"}
    --arch vit_micro
    --image-size 64
    --batch-size 32
    --optimizer adamw                                # for a ViT; the papers' LARS is for ResNet-50
    --weight-decay 0.04
    --steps 2400
)
mesh=(
    --data hands/easy
    --val hands/easy_val
    --label-fraction 0.1                             # a tenth of the poses
    --image-size 64
    --head-width 64
    --iterations 2
    --rotation 5                                     # the hands are upright
    --zoom 0.91 1.1
    --shift 0.05
    --color 0.4
    --batch-size 32
    --lr 4e-3
    --drop-path 0
    --dropout 0
    --ema 0.99
    --steps 400
)
scores=()

train_mesh() {               # train_mesh NAME SEED FLAG ...: trains and scores a mesh network
    local name=$1 seed=$2
    shift 2
    local run=runs/table_contrastive/mesh_$name.$seed
    "$python" finetune_mesh.py --out "$run" --seed "$seed" "${mesh[@]}" "$@"
    "$python" evaluate.py --data hands/easy_val --checkpoint "$run/last.pt" --out "$run/scores"
    scores+=("$name=$run/scores/metrics.json")
}

row() {                      # row NAME [SWITCH ...]: pre-trains, probes and fine-tunes, once a seed
    local name=$1 seed run
    shift
    for seed in $seeds; do
        run=runs/table_contrastive/$name.$seed
        "$python" pretrain_contrastive.py --out "$run" --seed "$seed" "${pretraining[@]}" "$@"
        "$python" probe.py "$run/encoder.pt" --data hands/easy_val --train hands/easy --out "$run/probe"
        train_mesh "$name" "$seed" --init "$run/encoder.pt"
    done
}

if [ $# -gt 0 ]; then
    row "$@"
    exit
fi

for seed in $seeds; do
    train_mesh scratch "$seed" --arch vit_micro
done
# The temperatures and rates are the best of those in docs/experiments.md.
row simclr --method simclr --temperature 0.05
row peclr --method peclr --temperature 0.05
row simhand --method simhand --weights none --temperature 0.2 --lr 5e-5
# Mean and deviation of the seeds.
"$python" evaluate.py --compare "${scores[@]}" --out runs/table_contrastive/meshes
