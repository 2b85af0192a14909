#!/usr/bin/env bash
# Multimodal QNormBias: alpacaLlava_llamaQformerv2Peft_normBias_QF_13B.sh <pretrained path> <llama config> <tokenizer> <image folder> [more flags or overrides]
OUTPUT=${OUTPUT:-output/finetune/mm/alpacaLlava_llamaQformerv2Peft_normBias_QF_13B} exec "$(dirname "$0")/../launch.sh" alpaca_llava_norm_bias mm/alpaca_llava "$@"
