#!/usr/bin/env bash
# The simulations of strategies in the README. Stop it whenever you like: the next call goes on after the last finished
# round. About six hours on one core; results.json of each folder is kept in the repository.
#
#   evidence/simulate.sh [CORE] [SEEDS]
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=lib OMP_NUM_THREADS=1
data=../shared/data
strategies=auto,random,random_fg,epistemic,first,last,kcenter,typiclust,probcover,entropy,bald,disagreement,claspe,clue

run() { # SET LABELS OPTIONS...
    local set=$1 labels=$2
    shift 2
    taskset -c "$core" .venv/bin/python -m samadapt simulate "$data/$set" --labels "$labels" --image-size 64 \
        --recipes autosam_vit --strategies $strategies --copies 2 --output "evidence/simulate-$set" "$@"
}

core=${1:-0}
for seed in ${2:-0 1 2 3 4}; do
    run hippocampus_mr anterior,posterior --seeds "$seed" --rounds 6 --pool 30 --steps 80 --test 8
    run acdc_mr "right ventricle,myocardium,left ventricle" --seeds "$seed" --rounds 6 --steps 80 --test 8
    run curvas_ct_2d pancreas,kidney,liver --seeds "$seed" --rounds 6 --per-round 2 --steps 80 --test 12
done
