#!/usr/bin/env bash
# How well the estimated quality of masks agrees with the truth on cases that the model has never seen: the default
# recipe learns from some labelled cases of a set, then every other case is segmented, and its estimate compared.
# A quarter of an hour on one core. results.json of each folder is kept in the repository; evidence/agreement.py makes the
# README's table and picture of it.
#
#   evidence/agreement.sh [CORE] [SETS]
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=lib OMP_NUM_THREADS=1
. evidence/sets.sh
core=${1:-0}

measure() { # SET LABELLED TESTED
    local output=evidence/agreement-$1 from
    [ -s "$output/results.json" ] && return
    rm -rf "$output"
    mkdir -p "$output"/{labelled,tested}/{images,labels}
    from=$(folder_of "$1")
    for folder in labelled tested; do
        [ ! -f "$from/patients.json" ] || cp "$from/patients.json" "$output/$folder/"
    done
    share() { # FOLDER FILES...: images and labels of some cases
        local folder=$1 image
        shift
        for image in "$@"; do
            ln -s "$(realpath "$from/images/$image")" "$output/$folder/images/"
            ln -s "$(realpath "$from/labels/$image")" "$output/$folder/labels/"
        done
    }
    mapfile -t files < <(ls "$from/images")
    share labelled "${files[@]:0:$2}"
    share tested "${files[@]:$2:$3}"
    taskset -c "$core" .venv/bin/python -m samadapt train "$output/labelled" --labels "$(labels_of "$1")" \
        --conf image_size=64 --conf max_steps=200 --conf max_train_minutes=60
    taskset -c "$core" .venv/bin/python -m samadapt evaluate "$output/tested" --json --plot "$output/agreement.png" \
        --model "$output"/labelled/.samadapt/models/v0001.safetensors >"$output/found.json"
    mv "$output/found.json" "$output/results.json"
}

for set in ${2:-hippocampus_mr acdc_mr curvas_ct_2d}; do
    case $set in
    hippocampus_mr) measure $set 12 40 ;;
    acdc_mr) measure $set 12 8 ;;
    curvas_ct_2d) measure $set 21 15 ;;
    esac
done
