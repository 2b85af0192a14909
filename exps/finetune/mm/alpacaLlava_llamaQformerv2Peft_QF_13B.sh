#!/usr/bin/env bash
# Multimodal QNormBiasLoRA: alpacaLlava_llamaQformerv2Peft_QF_13B.sh <pretrained path> <llama config> <tokenizer> <image folder> [more flags or overrides]
OUTPUT=${OUTPUT:-output/finetune/mm/alpacaLlava_llamaQformerv2Peft_QF_13B} exec "$(dirname "$0")/../launch.sh" alpaca_llava_norm_bias_lora mm/alpaca_llava "$@"
