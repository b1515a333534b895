#!/usr/bin/env bash
# bash recipes/smoke.sh [DIR]: every stage two steps on tiny drawn data, training under torchrun too. Under a
# minute on two cores. Writes DIR (default out/smoke), or its own of an earlier call anew; prints "smoke: all
# stages ran". PYTHON= another interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
out=${1:-out/smoke}
if [ -e "$out" ] && [ ! -e "$out/.smoke" ] && [ -n "$(ls -A "$out")" ]; then
    echo "error: $out holds files that are not of this recipe: choose another DIR" >&2
    exit 2
fi
rm -rf "$out"
mkdir -p "$out"
touch "$out/.smoke"
export OMP_NUM_THREADS=1

tiny=(
    --arch vit_micro         # the smallest ViT
    --image-size 32          # four patches
    --batch-size 4
    --steps 2
    --workers 0              # decodes in the process itself
    --log-every 1
)
two=("$python" -m torch.distributed.run --standalone --nproc_per_node=2)

"$python" make_synthetic.py --out "$out/train" --hands 24 --videos 6 --size 64
"$python" make_synthetic.py --out "$out/val" --hands 4 --videos 4 --size 64 --seed 1
"$python" mine_pairs.py --data "$out/train" --out "$out/pairs.npz" --labelled
"$python" pretrain_mim.py --data "$out/train" --out "$out/mim" --prototypes 64 "${tiny[@]}"
"${two[@]}" pretrain_mim.py --data "$out/train" --out "$out/mim2" --prototypes 64 "${tiny[@]}"
"${two[@]}" pretrain_contrastive.py --data "$out/train" --pairs "$out/pairs.npz" --labelled \
    --out "$out/simhand" "${tiny[@]}"
"${two[@]}" finetune_mesh.py --data "$out/train" --val "$out/val" --init "$out/mim/encoder.pt" \
    --out "$out/mesh" --head-width 32 "${tiny[@]}"
"$python" evaluate.py --data "$out/val" --checkpoint "$out/mesh/last.pt" --out "$out/evaluation"
"$python" probe.py "$out/mim/encoder.pt" --data "$out/train" --out "$out/probe"
"$python" predict.py "$out/val/images" --checkpoint "$out/mesh/last.pt" --out "$out/predictions"
echo "smoke: all stages ran"
