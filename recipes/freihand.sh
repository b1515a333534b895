#!/usr/bin/env bash
# bash recipes/freihand.sh [FREIHAND [MANO]]: FreiHAND on one GPU: HandMIM, mesh, scores and leaderboard file.
# FREIHAND: the unpacked FreiHAND_pub_v2.zip, with FreiHAND_pub_v2_eval.zip beside or inside it.
# MANO: MANO_RIGHT.pkl of mano_v1_2.zip.    On eight GPUs: torchrun --nproc_per_node=8 in place of python.
# Given again, it goes on where it was stopped.
# We have not run it on the real data set, which was not at hand; its flags follow iBOT and PyMAF.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
freihand=${1:-FreiHAND_pub_v2}
mano=${2:-MANO_RIGHT.pkl}

# Before a day of pre-training: the mesh needs it.
"$python" -c 'import sys, mano, runtime; runtime.run(lambda: mano.Mano(mano.read_mano(sys.argv[1])))' "$mano"

for split in train val evaluation; do            # val: every 20th pose of the training set
    if [ ! -e "freihand/$split/index.json" ]; then
        "$python" prepare_data.py freihand "$freihand" --split "$split" --out "freihand/$split"
    fi
done

pretraining=(
    --arch vit_small         # what one GPU trains in a day; vit_base on eight
    --batch-size 256         # --accumulate 2 where memory is short
    --epochs 100
    --resume auto
)
"$python" pretrain_mim.py --data freihand/train --out runs/freihand_mim "${pretraining[@]}"

mesh=(
    --init runs/freihand_mim/encoder.pt
    --mano "$mano"
    --epochs 100
    --resume auto
)
"$python" finetune_mesh.py --data freihand/train --val freihand/val --out runs/freihand "${mesh[@]}"
"$python" evaluate.py --data freihand/evaluation --mano "$mano" \
    --checkpoint runs/freihand/last.pt --out runs/freihand/evaluation
