#!/usr/bin/env bash
# Downloads GLUE tasks from the addresses of GLUE's own download script, and unpacks them in the layout that run_glue.py
# reads.
# Usage: bash scripts/download_finetune_dataset.sh <task|all> <data-dir>
#   task       cola sst2 mrpc stsb qqp mnli qnli rte wnli ax, or all of them
#   data-dir   the GLUE root: <data-dir>/MRPC/train.tsv and so on; archives are kept in <data-dir>/downloads
#   FRUGAL_GLUE_URL   in the environment: take the files from there, https:// or file://
# An interrupted download goes on where it stopped. A file is refused unless its SHA-256 is that of scripts/glue.sha256,
# which are the checksums that Hugging Face's datasets library recorded for GLUE 1.0.0. Without a network it says which
# files to copy where, and ends with exit code 2.
set -euo pipefail

usage() { sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }
scripts=$(dirname "${BASH_SOURCE[0]}")
base=${FRUGAL_GLUE_URL:-https://dl.fbaipublicfiles.com}
tasks="cola sst2 mrpc stsb qqp mnli qnli rte wnli ax"

# Paths of a task's files, below the base address.
files_of() {
    case $1 in
        mrpc) echo senteval/senteval_data/msr_paraphrase_{train,test}.txt glue/data/mrpc_dev_ids.tsv ;;
        qqp) echo glue/data/QQP-clean.zip ;;
        qnli) echo glue/data/QNLIv2.zip ;;
        ax) echo glue/data/AX.tsv ;;
        *) echo "glue/data/$(folder_of "$1").zip" ;;
    esac
}

# As far as the authors of the data state one; ask them before you pass data on.
licence_of() {
    case $1 in
        cola) echo "none stated; excerpts from published works, which remain their authors'" ;;
        sst2) echo "none stated (Stanford); sentences from film reviews" ;;
        mrpc) echo "Microsoft Research's licence for the paraphrase corpus, in its installer" ;;
        stsb) echo "several, in LICENSE.txt beside the data" ;;
        qqp) echo "Quora's terms of service: no commercial use" ;;
        mnli) echo "OANC's for most parts, CC BY 3.0 and CC BY-SA 3.0 for fiction" ;;
        qnli) echo "CC BY-SA 4.0, as SQuAD" ;;
        rte) echo "none stated (PASCAL and TAC challenges)" ;;
        wnli) echo "CC BY 4.0, as the Winograd schemas" ;;
        ax) echo "none stated (GLUE's diagnostic set)" ;;
    esac
}

folder_of() {
    case $1 in
        cola) echo CoLA ;; sst2) echo SST-2 ;; mrpc) echo MRPC ;; stsb) echo STS-B ;; qqp) echo QQP ;;
        mnli) echo MNLI ;; qnli) echo QNLI ;; rte) echo RTE ;; wnli) echo WNLI ;; ax) echo AX ;;
    esac
}

sha256() {
    if command -v sha256sum >/dev/null; then sha256sum "$1"; else shasum -a 256 "$1"; fi | cut -d' ' -f1
}

# fetch <path>   into downloads; as .part until it is whole and its checksum is right
fetch() {
    local file=$downloads/${1##*/} expected found
    expected=$(awk -v path="$1" '$2 == path { print $1 }' "$scripts/glue.sha256")
    if [[ -f $file ]]; then
        found=$(sha256 "$file")
        [[ $found == "$expected" ]] && return
        echo "error: $file: its SHA-256 is $found, not $expected: delete it, or copy it again" >&2
        exit 2
    fi
    echo "downloading $base/$1"
    download "$base/$1" "$file.part" || no_network "$base/$1"
    found=$(sha256 "$file.part")
    if [[ $found != "$expected" ]]; then
        rm -f "$file.part"
        echo "error: $base/$1: its SHA-256 is $found, not $expected: damaged on the way, or changed there; what had" \
            "come is deleted, run this again" >&2
        exit 2
    fi
    mv "$file.part" "$file"
}

# download <address> <file>   goes on where it stopped, or begins again where that is refused; sets fault
download() {
    local code=0 curl=(curl --fail --location --silent --show-error --retry 3)
    fault=$("${curl[@]}" -C - -o "$2" "$1" 2>&1) || code=$?
    if [[ -s $2 && $code =~ ^(22|33|36)$ ]]; then # nothing is left to send, or the server sends no parts of files
        rm -f "$2"
        code=0
        fault=$("${curl[@]}" -o "$2" "$1" 2>&1) || code=$?
    fi
    return "$code"
}

no_network() {
    echo "error: $1 cannot be downloaded (${fault##*$'\n'}). With a network, run this again: it goes on where it stopped." \
        "Without one, fetch these files elsewhere, copy them to $downloads, and run this again:" >&2
    for task in $chosen; do
        for path in $(files_of "$task"); do echo "  https://dl.fbaipublicfiles.com/$path" >&2; done
    done
    exit 2
}

# GLUE's own cut of Microsoft's files: its validation split are the training pairs that mrpc_dev_ids.tsv names.
cut_mrpc() {
    local train=$downloads/msr_paraphrase_train.txt test=$downloads/msr_paraphrase_test.txt
    awk -F '\t' -v OFS='\t' -v folder="$1" '
        { sub(/\r$/, "") }
        FILENAME ~ /dev_ids/ { dev[$1, $2] = 1; next }
        FNR == 1 { sub(/^\357\273\277/, ""); print > (folder "/train.tsv"); print > (folder "/dev.tsv"); next }
        { print > (folder (($2, $3) in dev ? "/dev.tsv" : "/train.tsv")) }
    ' "$downloads/mrpc_dev_ids.tsv" "$train"
    awk -F '\t' -v OFS='\t' '
        { sub(/\r$/, "") }
        { print (FNR == 1 ? "index" : FNR - 2), $2, $3, $4, $5 }
    ' "$test" >"$1/test.tsv"
}

if (($# != 2)) || [[ $1 == -* ]]; then
    [[ ${1:-} == --help || ${1:-} == -h ]] && usage && exit
    echo "error: $# arguments: give a task and a folder" >&2
    usage >&2
    exit 2
fi
chosen=$1
[[ $1 == all ]] && chosen=$tasks
if [[ " $tasks " != *" $1 "* && $1 != all ]]; then
    echo "error: task '$1' is unknown: choose one of $tasks, or all" >&2
    exit 2
fi
for tool in curl python3; do
    command -v "$tool" >/dev/null || { echo "error: $tool is not installed: it is needed here" >&2 && exit 2; }
done
root=$2
downloads=$root/downloads
mkdir -p "$downloads" || exit 2

for task in $chosen; do
    folder=$(folder_of "$task")
    echo "$folder: licence: $(licence_of "$task")"
    for path in $(files_of "$task"); do fetch "$path"; done
    if [[ -d $root/$folder ]]; then
        echo "$folder: verified; $root/$folder is there already and is left alone"
        continue
    fi
    unfinished=$root/.$folder.unfinished # a folder is whole or absent
    rm -rf "$unfinished"
    mkdir -p "$unfinished/$folder"
    case $task in
        mrpc) cut_mrpc "$unfinished/$folder" ;;
        ax) cp "$downloads/AX.tsv" "$unfinished/$folder/AX.tsv" ;;
        *) python3 -m zipfile -e "$downloads/${path##*/}" "$unfinished" ;;
    esac
    mv "$unfinished/$folder" "$root/$folder"
    rm -rf "$unfinished"
    echo "$folder: verified and unpacked in $root/$folder"
done
