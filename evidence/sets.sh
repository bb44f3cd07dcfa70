# Where the sets of the other scripts are, and their structures. Sourced, not run.

data=../shared/data

# Folder of a set's images and labels. File names of the 2D CT begin with the patient, which no program can know.
folder_of() {
    [ "$1" = curvas_ct_2d ] || { echo "$data/$1"; return; }
    local folder=evidence/data-$1
    mkdir -p "$folder"
    ln -sfn "$(realpath "$data/$1/images")" "$folder/images"
    ln -sfn "$(realpath "$data/$1/labels")" "$folder/labels"
    ls "$data/$1/images" | sed -E 's/^(([^_]+)_.*)\.png$/  "\1": "\2"/; $!s/$/,/; 1s/^/{\n/; $s/$/\n}/' >"$folder/patients.json"
    echo "$folder"
}

labels_of() {
    case $1 in
    hippocampus_mr) echo anterior,posterior ;;
    acdc_mr) echo "right ventricle,myocardium,left ventricle" ;;
    busi_us_2d) echo "benign lesion,malignant lesion" ;;
    curvas_ct_2d) echo pancreas,kidney,liver ;;
    esac
}
