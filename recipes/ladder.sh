#!/usr/bin/env bash
# bash recipes/ladder.sh                            every row; then ladder_table.py
# bash recipes/ladder.sh NAME STAGE [SWITCH ...]    one row: STAGE is mim, contrastive, untrained or scratch
#
# Given again, it skips what is done and goes on with what was cut off.
# A run sees its 24,000 hands four times: ten minutes on one core for the smallest ViT. Another length needs
# folders of its own: STEPS=15000 RUNS=runs/ladder_long sees them 20 times.
# Runs are runs/ladder/NAME.SEED: probe/metrics.json and mesh_0.1/scores/metrics.json hold the numbers.
# NAME anywhere_... is of hands seen from anywhere, NAME pool_... of real photographs.
# In the environment:
#   ROWS="handmim ibot"    rows to run (default: all)          SEEDS="0 1 2"    seeds of each
#   JOBS=1                 runs side by side (default: cores)  STEPS=3000       of 32 hands
#   LABELS="0.1 1"         shares of the labels to fine-tune with (default: a tenth)
#   CACHE=device           on a GPU                             PYTHON=          another interpreter
#   RUNS=runs/ladder       folder of the runs: another one for another length
#   OUT=RUNS/table         where the table goes. docs/ladder adds to the runs that are kept there
#   PRECISION=bf16         on a CPU whose /proc/cpuinfo says avx512_bf16: 1.5 times as fast
#   POOL=INDEX POOL_VAL=INDEX    photographs with keypoints, of other scenes in either (prepare_data.py video)
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
python=${PYTHON:-python}
together=${JOBS:-$("$python" -c 'from runtime import cores; print(cores())')}
steps=${STEPS:-3000}
runs=${RUNS:-runs/ladder}
if [ $((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1])) -lt 403 ]; then
    echo "error: bash $BASH_VERSION is too old: 4.3 or newer is needed" >&2
    exit 2
fi

machine=(--cache "${CACHE:-file}" --workers 0 --precision "${PRECISION:-auto}")
pretraining=(
    "${machine[@]}"
    --image-size 64
    --batch-size 32          # many small batches
    --log-every 50
    --resume auto
)
length=(--steps "$steps" --save-every $((steps < 20 ? 1 : steps / 20)))   # the probe sees it 20 times
mim=(
    --prototypes 1024        # far below the number of hands
    --lr 4e-3                # at batch 256
)
contrastive=(
    --optimizer adamw        # for a ViT; the papers' LARS is for ResNet-50
    --weight-decay 0.04
)
mesh=(
    "${machine[@]}"
    --image-size 64
    --head-width 64
    --iterations 2
    --rotation 5             # the hands are upright, but for anywhere_...
    --zoom 0.91 1.1
    --shift 0.05
    --color 0.4
    --batch-size 32
    --lr 4e-3
    --drop-path 0
    --dropout 0
    --ema 0.99
    --steps 400
    --resume auto
)
hog=(--hog 3 --align 0.2 --patch-loss 0.1 --pixel-loss 0.3)   # HandMIM + HOG
both=(--pair-share 1 --contrast 1)                            # similar hands for all, and InfoNCE
simhand=(--method simhand --weights none --temperature 0.2 --lr 5e-5)

use() {                      # use SET: the hands of the rows that follow
    set_=$1
    train=hands/$1 val=hands/${1}_val pairs=hands/${1}_pairs/pairs.npz
    case $1 in
        easy) drawing=(--look plain --tilt 12 --anywhere 0) ;;
        anywhere) drawing=(--look plain --anywhere 0.25) ;;
        pool) train=${POOL:-} val=${POOL_VAL:-} ;;
    esac
}

draw() {                     # draw INDEX FLAG ...: once
    if [ "$set_" != pool ] && [ ! -e "$1/index.json" ]; then
        "$python" make_synthetic.py --out "$@" "${drawing[@]}"
    fi
}

draw_hands() {
    draw "$train" --hands 24000 --videos 8000
    draw "$val" --hands 3000 --videos 1500 --seed 1
    if [ ! -e "$pairs" ]; then
        "$python" mine_pairs.py --data "$train" --out "$pairs"
    fi
}

job() {                      # job NAME SEED STAGE [SWITCH ...]: pre-trains, probes, fine-tunes
    local name=$1 seed=$2 stage=$3 run=$runs/$1.$2 all start labels
    shift 3
    all=(--data "$train" --arch vit_micro --probe "$val" --seed "$seed" --out "$run" "${pretraining[@]}")
    start=(--init "$run/encoder.pt")
    case $stage in               # the row's own switches come last: they decide
        mim) set -- pretrain_mim.py "${all[@]}" "${mim[@]}" "${length[@]}" "$@" ;;
        contrastive) set -- pretrain_contrastive.py "${all[@]}" --pairs "$pairs" "${contrastive[@]}" \
            "${length[@]}" "$@" ;;
        untrained) set -- pretrain_mim.py "${all[@]}" --steps 1 --lr 0
            start=(--arch vit_micro) ;;
        scratch) start=("$@") ;;
    esac
    if [ "$stage" != scratch ] && [ ! -e "$run/probe/metrics.json" ]; then
        "$python" "$@"
        "$python" probe.py "$run/encoder.pt" --data "$val" --train "$train" --out "$run/probe"
    fi
    [ "$set_" != pool ] || return 0
    for labels in ${LABELS:-0.1}; do
        if [ ! -e "$run/mesh_$labels/scores/metrics.json" ]; then
            "$python" finetune_mesh.py --data "$train" --val "$val" --out "$run/mesh_$labels" --seed "$seed" \
                --label-fraction "$labels" "${start[@]}" "${mesh[@]}"
            "$python" evaluate.py --data "$val" --checkpoint "$run/mesh_$labels/last.pt" \
                --out "$run/mesh_$labels/scores"
        fi
    done
}

started=" "                  # NAME.SEED of the rows so far

wait_until() {               # wait_until N: at most N runs go on. A run that failed ends the ladder
    while [ "$(jobs -rp | wc -l)" -gt "$1" ]; do
        wait -n
    done
}

refuse_other_length() {      # refuse_other_length RUN: one table holds runs of one length
    if [ -e "$1/config.json" ] && ! grep -q "\"steps\": $steps," "$1/config.json"; then
        echo "$1 has not $steps steps: ask for its STEPS, or choose other RUNS" >&2
        refused=yes
        exit 2
    fi
}

row() {                      # row NAME STAGE [SWITCH ...]: once a seed, where ROWS asks for it
    local name=$1 seed
    shift
    case " ${ROWS:-$name} " in *" $name "*) ;; *) return 0 ;; esac
    draw_hands
    mkdir -p "$runs"
    for seed in ${SEEDS:-$seeds}; do
        case $started in *" $name.$seed "*) continue ;; esac
        started+="$name.$seed "
        case "$*" in
            untrained* | scratch* | *" --steps "*) ;;
            *) refuse_other_length "$runs/$name.$seed" ;;
        esac
        echo "$name.$seed: $runs/$name.$seed.txt"
        if [ "$together" = 1 ]; then
            job "$name" "$seed" "$@" >>"$runs/$name.$seed.txt" 2>&1
        else
            wait_until $((together - 1))
            set -m           # a process group of its own, which can be ended as a whole
            job "$name" "$seed" "$@" >>"$runs/$name.$seed.txt" 2>&1 &
            set +m
        fi
    done
}

finish() {
    local status=$? run
    [ $status = 0 ] || [ "$refused" ] || echo "stopped: the ends of $runs/*.txt say why" >&2
    for run in $(jobs -rp); do
        kill -- "-$run"      # it saves first
    done
}
refused=
trap finish EXIT

seeds="0 1 2"
if [ $# -gt 0 ]; then
    case $1 in anywhere_*) use anywhere ;; pool_*) use pool ;; *) use easy ;; esac
    ROWS='' row "$@"
    wait_until 0
    exit
fi

for name in ${ROWS:-}; do
    problem=
    [ "$name" = "${name#pool_}" ] || [ -n "${POOL:-}" ] || problem="$name needs POOL"
    grep -q "row $name [a-z]" recipes/ladder.sh || problem="there is no row $name"
    if [ "$problem" ]; then
        echo "error: ROWS: $problem" >&2
        refused=yes
        exit 2
    fi
done

use easy
row untrained untrained
row ibot mim --pose-loss class --pixel-loss 0                              # iBOT's losses
row handmim mim
row no_keypoints mim --pose-loss none                                      # HandMIM less one of its parts
row no_patches mim --patch-loss 0
row no_pixels mim --pixel-loss 0
seeds=0
row pixels mim --pose-loss none --patch-loss 0 --mask-share 1              # one part alone
row patches mim --pose-loss none --pixel-loss 0
row keypoints mim --patch-loss 0 --pixel-loss 0
row hog mim --hog 3 --align 0 --patch-loss 0 --pixel-loss 0
row handmim_hog mim "${hog[@]}"
row contrast mim --contrast 1                                              # HandMIM + InfoNCE
row similar mim --pairs "$pairs"                                           # ... + similar hands, for half
row similar_contrast mim --pairs "$pairs" "${both[@]}"                     # ... + both, for all
row hog_similar_contrast mim "${hog[@]}" --pairs "$pairs" "${both[@]}"
row simclr contrastive --method simclr --temperature 0.05
row peclr contrastive --method peclr --temperature 0.05
row simhand contrastive "${simhand[@]}"
row resnet18 scratch --arch resnet18                                       # the rival without pre-training

use anywhere
row anywhere_untrained untrained
row anywhere_ibot mim --pose-loss class --pixel-loss 0
row anywhere_handmim mim
row anywhere_handmim_hog mim "${hog[@]}"
row anywhere_similar mim --pairs "$pairs"
row anywhere_similar_contrast mim --pairs "$pairs" "${both[@]}"
row anywhere_hog_similar_contrast mim "${hog[@]}" --pairs "$pairs" "${both[@]}"
row anywhere_simhand contrastive "${simhand[@]}"
row anywhere_resnet18 scratch --arch resnet18

use easy
seeds="0 1 2"                                                              # what the headline says
row handmim_hog mim "${hog[@]}"
row similar mim --pairs "$pairs"
row hog_similar_contrast mim "${hog[@]}" --pairs "$pairs" "${both[@]}"
row simclr contrastive --method simclr --temperature 0.05
row peclr contrastive --method peclr --temperature 0.05
row simhand contrastive "${simhand[@]}"
row resnet18 scratch --arch resnet18
wait_until 0                                                               # the next row needs SiMHand's
for seed in ${SEEDS:-$seeds}; do
    SEEDS=$seed row simhand_handmim mim --init "$runs/simhand.$seed/encoder.pt"
done

if [ -n "${POOL:-}" ]; then
    use pool
    row pool_untrained untrained
    row pool_handmim mim
    row pool_handmim_hog mim "${hog[@]}"
    row pool_similar mim --pairs "$pairs"
    row pool_similar_contrast mim --pairs "$pairs" "${both[@]}"
    row pool_hog_similar_contrast mim "${hog[@]}" --pairs "$pairs" "${both[@]}"
    row pool_simclr contrastive --method simclr --temperature 0.05
    row pool_peclr contrastive --method peclr --temperature 0.05
    row pool_simhand contrastive "${simhand[@]}"
    row pool_drawn_handmim mim --data "$POOL" hands/anywhere --mix 0.5 0.5
fi
wait_until 0
"$python" recipes/ladder_table.py --runs "$runs" --out "${OUT:-$runs/table}"
