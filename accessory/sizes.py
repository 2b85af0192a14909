"""LLaMA2's sizes, by name: for estimates and benchmarks, which need no checkpoint. Imports nothing, so that it can be
read before a library that wants to be first."""

# hidden size, MLP's width, blocks, heads, key/value heads, vocabulary
SHAPES = {
    "tiny": (128, 384, 4, 4, 4, 1000),
    "7b": (4096, 11008, 32, 32, 32, 32000),
    "13b": (5120, 13824, 40, 40, 40, 32000),
    "70b": (8192, 28672, 80, 64, 8, 32000),
}
