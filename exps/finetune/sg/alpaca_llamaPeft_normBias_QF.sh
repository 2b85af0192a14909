#!/usr/bin/env bash
# QNormBias on alpaca: alpaca_llamaPeft_normBias_QF.sh <pretrained path> <llama config> <tokenizer> [more flags or overrides]
OUTPUT=${OUTPUT:-output/finetune/sg/alpaca_llamaPeft_normBias_QF} exec "$(dirname "$0")/../launch.sh" alpaca_norm_bias sg/alpaca "$@"
