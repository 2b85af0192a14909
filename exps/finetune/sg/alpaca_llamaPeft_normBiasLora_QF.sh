#!/usr/bin/env bash
# QNormBiasLoRA on alpaca: alpaca_llamaPeft_normBiasLora_QF.sh <pretrained path> <llama config> <tokenizer> [more flags or overrides]
OUTPUT=${OUTPUT:-output/finetune/sg/alpaca_llamaPeft_normBiasLora_QF} exec "$(dirname "$0")/../launch.sh" alpaca_norm_bias_lora sg/alpaca "$@"
