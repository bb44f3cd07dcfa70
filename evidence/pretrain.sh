#!/usr/bin/env bash
# What pretraining on images without labels brings: LiteMedSAM goes on learning from all volumes of a set (those of the
# test patients, too, without their labels, as a hospital would), and recipes then start from it. The same cases, seeds
# and steps as in compare.sh, whose runs start from LiteMedSAM's own weights.
#
#   evidence/pretrain.sh [CORE] [SET]        ten minutes of pretraining on one core, then eight runs
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=lib OMP_NUM_THREADS=1
. evidence/sets.sh
core=${1:-0}
set=${2:-acdc_mr}
weights=evidence/pretrained-$set/lite_medsam.safetensors

[ -f "$weights" ] || taskset -c "$core" .venv/bin/python -m samadapt pretrain "$(folder_of $set)" --image-size 64 \
    --steps 400 --output "$weights"
taskset -c "$core" .venv/bin/python -m samadapt compare "$(folder_of $set)" --labels "$(labels_of $set)" \
    --image-size 64 --test 8 --recipes lora_late,autosam_vit --cases 4,8 --seeds 0,1 --minutes 60 \
    --conf max_steps=80 --conf weights="$weights" --output "evidence/pretrained-$set"
