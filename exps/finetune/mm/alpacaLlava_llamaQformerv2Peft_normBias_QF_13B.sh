#!/usr/bin/env bash
# Multimodal QNormBias on alpaca and LLaVA-Instruct-150K, LLaMA2-13B with a Q-Former:
# alpacaLlava_llamaQformerv2Peft_normBias_QF_13B.sh <pretrained path> <llama config> <tokenizer> <image folder> [more flags or overrides]
set -euo pipefail
if [ $# -lt 4 ]; then
    echo "usage: <pretrained path> <llama config> <tokenizer> <image folder> [more flags or overrides]" >&2
    exit 2
fi
OUTPUT=${OUTPUT:-output/finetune/mm/alpacaLlava_llamaQformerv2Peft_normBias_QF_13B} exec "$(dirname "$0")/../launch.sh" \
    alpaca_llava_norm_bias mm/alpaca_llava "$1" "$2" "$3" --image_root "$4" "${@:5}"
