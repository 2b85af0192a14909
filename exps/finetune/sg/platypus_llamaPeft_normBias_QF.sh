#!/usr/bin/env bash
# QNormBias on platypus: platypus_llamaPeft_normBias_QF.sh <pretrained path> <llama config> <tokenizer> [more flags or overrides]
OUTPUT=${OUTPUT:-output/finetune/sg/platypus_llamaPeft_normBias_QF} exec "$(dirname "$0")/../launch.sh" platypus_norm_bias sg/platypus "$@"
