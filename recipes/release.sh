#!/usr/bin/env bash
# bash recipes/release.sh [DIR]: makes weights/hand.pt, the network that predict.py takes by default. Draws
# hands, fits the hand model to photographs that have a detector's points, pastes these hands before other
# backgrounds, trains on all, scores, packs. Given again, it goes on where it was stopped. Writes DIR (default
# out/release).
# In the environment:
#   POOL="INDEX ..."   photographs with keypoints (prepare_data.py video), an index a source: all sources are
#                      seen equally often. Other ones need another DIR. Without them it trains on drawn hands
#   POOL_VAL=INDEX     the same of other people, to score
#   HANDS=48000   to draw: 2.5 minutes of a core for 10,000     STEPS=15000   of 32 hands
#   TIMES=6       backgrounds that each photographed hand is pasted before
#   INIT=weights/hand.pt   goes on from this network, with STEPS further ones
#   Other HANDS, TIMES or INIT need another DIR.
#   SEED=0        of the training          PROCESSES=2          of torchrun, a core or a GPU each
#   CACHE=file    or device, on a GPU      PYTHON=              another interpreter
#   PRECISION=bf16   on a CPU whose /proc/cpuinfo says avx512_bf16: 1.3 times as fast
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
out=${1:-out/release}
hands=${HANDS:-48000}
steps=${STEPS:-15000}

draw() {                     # draw NAME HANDS SEED SHARE-SEEN-FROM-ANYWHERE, once
    if [ ! -e "$out/$1/index.json" ]; then
        "$python" make_synthetic.py --out "$out/$1" --hands "$2" --seed "$3" --anywhere "$4" \
            --videos $((($2 + 1) / 2))   # a video has one person, light and background
    fi
}
draw train "$hands" 1 0.5    # twice the default's: hands occur in all orientations
draw val 2000 900001 0.25

fit() {                      # fit NAME INDEX, once
    if [ ! -e "$out/$1/index.json" ]; then
        "$python" fit_hands.py --data "$2" --out "$out/$1"
    fi
}
photographs=()
pasted=()
for index in ${POOL:-}; do
    name=$((${#photographs[@]} + 1))
    fit "pool_$name" "$index"
    if [ ! -e "$out/pasted_$name/index.json" ]; then
        "$python" paste_hands.py --data "$out/pool_$name" --out "$out/pasted_$name" --times "${TIMES:-6}"
    fi
    photographs+=("$out/pool_$name")
    pasted+=("$out/pasted_$name")
done
data=("$out/train")
val=$out/val
sources=${#photographs[@]}
if [ "$sources" -gt 0 ]; then
    # Drawn hands keep the mesh right, photographs teach what hands look like,
    # pasted ones that what lies behind them does not matter.
    shares=(0.6)
    for share in 0.16 0.24; do
        for _ in "${photographs[@]}"; do
            shares+=("$(awk "BEGIN { print $share / $sources }")")
        done
    done
    data+=("${photographs[@]}" "${pasted[@]}" --mix "${shares[@]}")
fi
if [ -n "${POOL_VAL:-}" ]; then
    fit pool_val "$POOL_VAL"
    val=$out/pool_val        # what the log follows
fi

training=(
    --data "${data[@]}"
    --val "$val"
    --arch resnet_micro      # small enough for a laptop
    --image-size 96          # 12 ms a hand on one core
    --head-width 64          # channels of the head's maps
    --head-hidden 256        # of its regressors
    --joint-maps             # from scratch the orientation is learnt in half of the steps
    --rotation 60            # degrees either way
    --shift 0.15             # boxes of people and of detectors differ
    --color 0.3              # with more, skins turn green, as no lamp makes them
    --spoil 0.3              # tinted light, grey, blur, something before the hand
    --image-weight 4         # for overlays that fit
    --batch-size 32          # many small batches
    --lr 6e-3                # at batch 256
    --ema 0.999
    --dropout 0.05
    --steps "$steps"
    --seed "${SEED:-0}"
    --cache "${CACHE:-file}"
    --precision "${PRECISION:-auto}"
    --workers 0
    --eval-every 4000
    --save-minutes 5
    --resume auto
    ${INIT:+--init "$INIT"}
)
launch=("$python")
if [ "${PROCESSES:-1}" -gt 1 ]; then
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    launch=("$python" -m torch.distributed.run --standalone --nproc_per_node="$PROCESSES")
fi
"${launch[@]}" finetune_mesh.py --out "$out/mesh" "${training[@]}"

for part in val ${POOL_VAL:+pool_val}; do
    "$python" evaluate.py --data "$out/$part" --checkpoint "$out/mesh/last.pt" --out "$out/scores/$part"
done
rm -f "$out/hand.pt"         # of an earlier run of this recipe
"$python" export.py --checkpoint "$out/mesh/last.pt" --out "$out/hand.pt"
echo "$out/hand.pt is what weights/hand.pt is made of: copy it there"
