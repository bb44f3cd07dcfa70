#!/usr/bin/env bash
# The comparison of recipes in the README: 80 optimiser steps each, so that other programs on the machine change nothing
# but how long it takes (about four hours of one core). The U-Net, whose steps are much cheaper, gets 100 seconds instead,
# last, when nothing else should run.
# Stop it whenever you like: the next call goes on with the runs that are missing. results.json of each folder is kept
# in the repository, pictures and models are not.
#
#   evidence/compare.sh [CORE] [SET...]      all sets by default; two calls for different sets may run beside each other
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=lib OMP_NUM_THREADS=1
. evidence/sets.sh
recipes=lora_late,samed,sam_lst,s_sam,autosam_vit,ft/lite_medsam/encoder+decoder/adapter,cheap_lunch,peft/dora
study=$(printf 'ft/lite_medsam/%s,' {encoder+decoder,decoder}/{vanilla,adapter,lora})
core=${1:-0}
sets=${*:2}

compare() { # SET OPTIONS...
    local set=$1
    shift
    case " ${sets:-$set} " in *" $set "*) ;; *) return ;; esac
    taskset -c "$core" .venv/bin/python -m samadapt compare "$(folder_of $set)" --labels "$(labels_of $set)" \
        --image-size 64 --test 8 "$@"
}

steps() { # SET RECIPES OPTIONS...
    compare "$1" --recipes "$2" "${@:3}" --minutes 60 --conf max_steps=80 --output "evidence/compare-$1"
}

seconds() { # SET OPTIONS...
    compare "$1" --recipes unet "${@:2}" --minutes 1.67 --output "evidence/compare-$1-unet"
}

for cases in 8 1 4; do
    for set in hippocampus_mr acdc_mr; do steps $set $recipes --cases $cases --seeds 0; done
done
steps hippocampus_mr "${study%,}" --cases 8 --seeds 0
for set in busi_us_2d curvas_ct_2d; do steps $set $recipes --cases 8 --seeds 0; done
for cases in 1 4 8; do
    for set in hippocampus_mr acdc_mr; do steps $set $recipes --cases $cases --seeds 1; done
done
for set in hippocampus_mr acdc_mr; do seconds $set --cases 1,4,8 --seeds 0,1; done
for set in busi_us_2d curvas_ct_2d; do seconds $set --cases 8 --seeds 0; done
