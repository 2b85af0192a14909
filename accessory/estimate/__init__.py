"""How much GPU memory a training step or an answer takes: arithmetic on a model's shapes, before any weight is read.

    peak = base + trainables + gradients + optimizer + workspace      there all the time
         + the largest of   images                                    the image part, before the first block
                            activations + loss                        the logits of a chunk, and hidden states
                            activations + backward                    one block's intermediate results

base        payload of the quantized linears, as their backends store it; the rest in 16 bit, norms and biases in fp32
trainables  fp32 masters; on the fused path also 16-bit copies of biases, A and B
gradients   fp32 (a CUDA graph makes them once more, and adds them: counted with the backward of the first block)
optimizer   AdamW's two moments, fp32
activations of M = rows x width tokens, what the blocks keep for backward; a recomputed block keeps its input alone

Parameters and payload are counted on the model itself, loaded or on the meta device, so they are exact (`counting`).
Activations follow from the shapes: `_fused` and `_plain` in `training` say what a block keeps, and what its backward
needs besides. With compute in 16 bit (fp32: twice as much), hidden size d, MLP width f, q = heads x head_dim, kv
likewise, the fused path keeps of a block

    2 M (d + (q + 2 kv) + d + 2 f) + 8 M bytes     its input; q, k, v; the residual after attention; gate, up; 1 / rms

or 85 kB a token with 7B's sizes, 8 kB if recomputed; 69 kB and nothing where input and residual lie in host memory;
2 M q + 4 M heads more, 8 kB a token, with attention's output and its logsumexp.
Figures are those of torch.cuda.max_memory_allocated(); what the CUDA context and fragmentation take comes on top
(`OVERHEAD`).
"""

from accessory.estimate.counting import held_bytes, payload_bytes
from accessory.estimate.generation import estimate_generation
from accessory.estimate.parts import GIB, OVERHEAD, Estimate
from accessory.estimate.training import (
    Step,
    attention_fits,
    estimate_training,
    graphs_fit,
    host_bytes,
    recomputed_blocks_that_fit,
    save_memory,
)
from accessory.sizes import SHAPES

__all__ = [
    "GIB",
    "OVERHEAD",
    "SHAPES",
    "Estimate",
    "Step",
    "attention_fits",
    "estimate_generation",
    "estimate_training",
    "graphs_fit",
    "held_bytes",
    "host_bytes",
    "payload_bytes",
    "recomputed_blocks_that_fit",
    "save_memory",
]
