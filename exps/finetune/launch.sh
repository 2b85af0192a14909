#!/usr/bin/env bash
# launch.sh <experiment> <data> <pretrained path> <llama config> <tokenizer> [more flags or overrides]
# Runs configs/experiment/<experiment>.yaml on configs/data/finetune/<data>.yaml, on all GPUs of this machine (or one CPU
# process). NPROC, MASTER_PORT and OUTPUT can be set in the environment. Paths are taken from the current folder, where
# the data files are looked for too (../data, as in LLaMA2-Accessory; --data_config names another YAML).
set -euo pipefail
if [ $# -lt 5 ]; then
    echo "usage: <pretrained path> <llama config> <tokenizer> [more flags or overrides]" >&2
    exit 2
fi
root=$(cd "$(dirname "$0")/../.." && pwd)
experiment=$1 data=$2 pretrained=$3 llama_config=$4 tokenizer=$5
gpus=$(nvidia-smi -L 2>/dev/null | wc -l || true)
output=${OUTPUT:-output/finetune/$experiment}
case $data in
    mm/*) kind=(--llama_type llama_qformerv2_peft) ;;
    *) kind=(--llama_type llama_peft --no_visual) ;;
esac
mkdir -p "$output"

torchrun --master_port="${MASTER_PORT:-1112}" --nproc_per_node="${NPROC:-$((gpus > 0 ? gpus : 1))}" \
    "$root/main_finetune.py" experiment="$experiment" --output_dir "$output" \
    "${kind[@]}" --llama_config "$llama_config" --tokenizer_path "$tokenizer" \
    --pretrained_path "$pretrained" --data_config "$root/configs/data/finetune/$data.yaml" "${@:6}" \
    2>&1 | tee -a "$output/output.log"
