#!/usr/bin/env bash
# launch.sh <experiment> <data> <pretrained path> <llama config> <tokenizer> [image folder] [more flags or overrides]
# Runs configs/experiment/<experiment>.yaml on configs/data/finetune/<data>.yaml, on all GPUs of this machine (or one CPU
# process); data under mm/ has images and wants their folder. NPROC, MASTER_PORT and OUTPUT can be set in the environment.
# Paths are taken from the current folder, where the data files are looked for too (../data, as in LLaMA2-Accessory;
# --data_config names another YAML).
set -euo pipefail
experiment=$1 data=$2
shift 2
wanted=3 usage="<pretrained path> <llama config> <tokenizer>"
if [[ $data == mm/* ]]; then
    wanted=4 usage+=" <image folder>"
fi
if [ $# -lt $wanted ]; then
    echo "usage: $usage [more flags or overrides]" >&2
    exit 2
fi
root=$(cd "$(dirname "$0")/../.." && pwd)
pretrained=$1 llama_config=$2 tokenizer=$3
kind=(--llama_type llama_peft --no_visual)
if [[ $data == mm/* ]]; then
    if [ ! -d "$4" ]; then
        echo "error: $4: no such image folder; usage: $usage [more flags or overrides]" >&2
        exit 2
    fi
    kind=(--llama_type llama_qformerv2_peft --image_root "$4")
fi
shift $wanted
gpus=$(python -c 'import torch; print(torch.cuda.device_count())' 2>/dev/null || echo 1) # those that the run will see
output=${OUTPUT:-output/finetune/$experiment}
mkdir -p "$output"

torchrun --master_port="${MASTER_PORT:-1112}" --nproc_per_node="${NPROC:-$((gpus > 0 ? gpus : 1))}" \
    "$root/main_finetune.py" experiment="$experiment" --output_dir "$output" \
    "${kind[@]}" --llama_config "$llama_config" --tokenizer_path "$tokenizer" \
    --pretrained_path "$pretrained" --data_config "$root/configs/data/finetune/$data.yaml" "$@" \
    2>&1 | tee -i -a "$output/output.log" # -i: Ctrl-C is for the run, which saves and says so
