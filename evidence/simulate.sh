#!/usr/bin/env bash
# The simulations of strategies in the README. Stop it whenever you like: the next call goes on after the last finished
# round. About three hours on one core; results.json of each folder is kept in the repository. Sets can be played on
# several cores at once, each by a call of its own.
#
#   evidence/simulate.sh [CORE] [SEEDS] [SETS]
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=lib OMP_NUM_THREADS=1
. evidence/sets.sh
strategies=auto,random_fg,epistemic,random,typiclust,entropy,claspe,clue,kcenter,probcover,bald,disagreement,first,last
core=${1:-0}
seeds=${2:-0 1 2 3 4}
sets=${3:-hippocampus_mr acdc_mr curvas_ct_2d units}

run() { # OUTPUT SET OPTIONS...
    local output=$1 set=$2
    shift 2
    taskset -c "$core" .venv/bin/python -m samadapt simulate "$(folder_of $set)" --labels "$(labels_of $set)" \
        --image-size 64 --recipes autosam_vit --copies 2 --output "evidence/simulate-$output" "$@"
}

for set in $sets; do
    for seed in $seeds; do
        case $set in
        hippocampus_mr)
            run $set $set --strategies $strategies --seeds "$seed" \
                --rounds 4 --per-round 2 --pool 30 --test 8 --steps 120
            ;;
        acdc_mr)
            run $set $set --strategies $strategies --seeds "$seed" --rounds 5 --per-round 1 --test 8 --steps 80
            ;;
        curvas_ct_2d)
            run $set $set --strategies $strategies --seeds "$seed" --rounds 4 --per-round 3 --test 12 --steps 80
            ;;
        units)
            run $set hippocampus_mr --strategies auto,random --unit volumes,slices,scattered --seeds "$seed" \
                --rounds 3 --per-round 1 --pool 30 --test 8 --steps 120
            ;;
        esac
    done
done
