#!/usr/bin/env bash
# QNormBiasLoRA on alpaca: alpaca_llamaPeft_normBiasLora_QF.sh <pretrained path> <llama config> <tokenizer>
# As published, for 8 GPUs; NPROC (default: all GPUs here), MASTER_PORT and OUTPUT can be set in the environment, and
# further flags or overrides appended. The data is looked for in ../data of the current folder (see --data_config).
set -euo pipefail
if [ $# -lt 3 ]; then
    echo "usage: $0 <pretrained path> <llama config> <tokenizer> [more flags or overrides]" >&2
    exit 2
fi
root=$(cd "$(dirname "$0")/../../.." && pwd)
gpus=$(nvidia-smi -L 2>/dev/null | wc -l || true)
exp_name=finetune/sg/alpaca_llamaPeft_normBiasLora_QF
output=${OUTPUT:-output/$exp_name}
mkdir -p "$output"

torchrun --master_port="${MASTER_PORT:-1112}" --nproc_per_node="${NPROC:-$((gpus > 0 ? gpus : 1))}" "$root/main_finetune.py" \
    --output_dir "$output" --epochs 4 --warmup_epochs 1 \
    --batch_size 4 --accum_iter 2 --num_workers 4 \
    --max_words 512 \
    --lr 0.00005 --min_lr 0.000005 --clip_grad 2 --weight_decay 0.02 \
    --data_parallel sdp --model_parallel_size 1 --checkpointing \
    --llama_type llama_peft --llama_config "$2" "$root/configs/model/finetune/sg/llamaPeft_normBiasLora.json" --tokenizer_path "$3" \
    --no_visual \
    --pretrained_path "$1" \
    --data_config "$root/configs/data/finetune/sg/alpaca.yaml" \
    --quant --only_save_trainable "${@:4}" \
    2>&1 | tee -a "$output/output.log"
