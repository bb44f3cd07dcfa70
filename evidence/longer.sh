#!/usr/bin/env bash
# What is left of the recipes' order in README's table after 300 steps, about what the default budget of eight labelled
# cases allows: the same sets and cases as compare.sh with eight labelled cases.
#
#   evidence/longer.sh [CORE] [SET...]       about half an hour for each set
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=lib OMP_NUM_THREADS=1
. evidence/sets.sh
core=${1:-0}
sets=${*:2}
for set in ${sets:-acdc_mr hippocampus_mr}; do
    taskset -c "$core" .venv/bin/python -m samadapt compare "$(folder_of $set)" --labels "$(labels_of $set)" \
        --image-size 64 --test 8 --recipes lora_late,s_sam --cases 8 --seeds 0,1 --minutes 60 \
        --conf max_steps=300 --output "evidence/longer-$set"
done
