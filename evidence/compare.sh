#!/usr/bin/env bash
# The comparison of recipes in the README. Stop it whenever you like: the next call goes on with the runs that are
# missing. Ten hours on one core; results.json of each folder is kept in the repository, pictures and models are not.
#
#   evidence/compare.sh [CORE]
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=lib OMP_NUM_THREADS=1
data=../shared/data
recipes=lora_late,samed,sam_lst,s_sam,autosam_vit,ft/lite_medsam/encoder+decoder/adapter,cheap_lunch,peft/dora,unet,unet_auto

run() { # SET LABELS OPTIONS...: one folder of results for each set and purpose
    local set=$1 labels=$2 output=evidence/compare-$3
    shift 3
    taskset -c "${core:-0}" .venv/bin/python -m samadapt compare "$data/$set" --labels "$labels" --minutes 1.5 \
        --image-size 64 --output "$output" "$@"
}

core=${1:-0}
heart="right ventricle,myocardium,left ventricle"
study=$(printf 'ft/lite_medsam/%s,' {encoder+decoder,decoder}/{vanilla,adapter,lora})
for cases in 8 1 4; do
    for seed in 0 1; do
        run hippocampus_mr anterior,posterior hippocampus --recipes $recipes --cases $cases --seeds $seed --test 8
        run acdc_mr "$heart" acdc --recipes $recipes --cases $cases --seeds $seed --test 8
    done
done
run busi_us_2d "benign lesion,malignant lesion" busi --recipes $recipes --cases 8 --seeds 0,1 --test 8
run curvas_ct_2d pancreas,kidney,liver curvas --recipes $recipes --cases 8 --seeds 0,1 --test 8
run hippocampus_mr anterior,posterior hippocampus --recipes "${study%,}" --cases 8 --seeds 0,1 --test 8
