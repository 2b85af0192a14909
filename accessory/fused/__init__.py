"""A LLaMA block as one differentiable function with a backward of its own (`block`), out of pointwise functions that
torch.compile fuses (`pointwise`) and groups of frozen linears that share their input (`linears`); and the whole step as
one CUDA graph (`graph`)."""
