"""AWQ (arXiv:2306.00978): weights that meet large activations are scaled up before they are rounded.

Scaling (eq. 4, 5; variants as in llmc). Linears W that share an input x, which the module `previous` made, are replaced
by W diag(s), and the output channels of `previous` are divided by s: the same function, rounded to another grid. With
x_j the mean |x_j| of the calibration inputs, and r = k / n_grid for k = 0 .. n_grid - 1,

    v2   s = max(x^r, 1e-4)
    v1   s = max(x^r / w^(1-r), 1e-4)       with w_j the mean over rows of |W_j| / max|W| of its group

both divided by sqrt(max s min s). The s is taken with which the inspected module, whose linears compute with
Q(W diag(s)) diag(1/s), comes closest to its output with W (least mean square). v2 with r = 0 is plain rounding.

Clipping. Each row's group of weights w may be cut to a smaller range before rounding: of m = max|w| (1 - i / n_grid),
i = 0 .. n_grid / 2 - 1, the one is taken with the least mean of (x Q(clamp(w, -m, m))^T - x w^T)^2, that is, of
d (x^T x) d^T with d = Q(clamp(w, -m, m)) - w. So the sum of x^T x is all that is kept of the inputs.

`run` runs the block on all calibration inputs, several times. What is measured is accumulated in hooks, batch by batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.models.blip_2.modeling_blip_2 import Blip2EncoderLayer

from accessory.models.llama import Block
from accessory.quantization import rtn
from accessory.quantization.packed import Scheme
from accessory.quantize_options import AwqConfig, TransVersion

LEAST_SCALE = 1e-4
ROWS = 512  # of a weight that are clipped at a time: bounds the temporaries
# As in AWQ's and llmc's code: the products of queries and keys suffer from clipped weights.
NEVER_CLIPPED = {"q_proj", "k_proj", "query", "key", "qkv"}


@dataclass
class Subset:
    """Linears of a block that share an input, by their path in the block. previous: the module whose output channels
    are divided by the scales, None: no scaling; inspected: the module whose output is compared."""

    previous: Optional[nn.Module]
    linears: dict[str, nn.Linear]
    inspected: nn.Module


def subsets_of(block: nn.Module) -> list[Subset]:
    """Every linear of `block` once; those that nothing can be scaled against are subsets of their own."""
    scalable = []  # previous, linears, inspected
    if isinstance(block, Block):
        attention = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        scalable.append(("input_layernorm", attention, "self_attn"))
        if block.self_attn.v_proj.out_features == block.self_attn.o_proj.in_features:  # else heads share a value
            scalable.append(("self_attn.v_proj", ("self_attn.o_proj",), "self_attn.o_proj"))
        scalable.append(("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj"), "mlp"))
        scalable.append(("mlp.up_proj", ("mlp.down_proj",), "mlp.down_proj"))
    elif isinstance(block, Blip2EncoderLayer):
        scalable.append(("layer_norm1", ("self_attn.qkv",), "self_attn"))
        scalable.append(("layer_norm2", ("mlp.fc1",), "mlp"))
    modules = dict(block.named_modules())
    subsets = [
        Subset(modules[previous], {name: modules[name] for name in names}, modules[inspected])
        for previous, names, inspected in scalable
    ]
    covered = {name for subset in subsets for name in subset.linears}
    others = {n: m for n, m in modules.items() if isinstance(m, nn.Linear) and n not in covered}
    return subsets + [Subset(None, {name: linear}, linear) for name, linear in others.items()]


@torch.no_grad()
def adjust(block: nn.Module, run: Callable[[], None], schemes: dict[str, Scheme], options: AwqConfig) -> None:
    """Scale and clip the weights of `block` in place; rounding them is up to the caller.

    schemes: of the linears that will be rounded, by their path in the block. The others are scaled along, if they share
    an input with one of these, and not clipped.
    """
    subsets = subsets_of(block)
    if options.trans:
        scaled = [
            subset for subset in subsets if subset.previous is not None and subset.linears.keys() & schemes.keys()
        ]
        activations = _mean_activations(scaled, run)
        for subset, activation in zip(scaled, activations, strict=True):
            _scale(subset, _best_scales(subset, _candidates(subset, activation, schemes, options), run, schemes))
    if options.weight_clip:
        linears = {name: linear for subset in subsets for name, linear in subset.linears.items() if name in schemes}
        clipped = {name: linear for name, linear in linears.items() if name.split(".")[-1] not in NEVER_CLIPPED}
        for name, gram in _grams(clipped, run, schemes).items():
            weight = clipped[name].weight
            weight.copy_(_clip(weight.float(), gram, schemes[name], options))


def _mean_activations(subsets: list[Subset], run: Callable[[], None]) -> list[Tensor]:
    """mean |x| of each subset's input: fp32 [in]."""
    sums = [0.0] * len(subsets)
    counts = [0] * len(subsets)

    def add(index: int) -> Callable:
        def hook(module: nn.Module, args: tuple) -> None:
            x = args[0].reshape(-1, args[0].shape[-1])
            sums[index] = sums[index] + x.abs().sum(0, dtype=torch.float32)
            counts[index] += len(x)

        return hook

    firsts = [next(iter(subset.linears.values())) for subset in subsets]
    with _hooks([linear.register_forward_pre_hook(add(i)) for i, linear in enumerate(firsts)]):
        run()
    return [total / count for total, count in zip(sums, counts, strict=True)]


def _candidates(subset: Subset, x: Tensor, schemes: dict[str, Scheme], options: AwqConfig) -> list[Tensor]:
    """The scales to try: n_grid times fp32 [in]."""
    w = None
    if options.trans_version is TransVersion.v1:
        shares = [_share_of_group(linear.weight, schemes[n]) for n, linear in subset.linears.items() if n in schemes]
        w = torch.cat(shares).mean(0).clamp_(min=LEAST_SCALE)
    candidates = []
    for k in range(options.n_grid):
        r = k / options.n_grid
        scales = (x.pow(r) if w is None else x.pow(r) / w.pow(1 - r)).clamp_(min=LEAST_SCALE)
        candidates.append(scales / (scales.max() * scales.min()).sqrt())
    return candidates


def _share_of_group(weight: Tensor, scheme: Scheme) -> Tensor:
    """|w| / max|w| of its group: [out, in]."""
    size = weight.float().abs().view(len(weight), scheme.groups(weight.shape[1]), -1)
    return (size / size.amax(-1, keepdim=True).clamp(min=rtn.SMALLEST_RANGE)).view_as(weight)


def _best_scales(
    subset: Subset, candidates: list[Tensor], run: Callable[[], None], schemes: dict[str, Scheme]
) -> Tensor:
    """The candidate with the least square error of the inspected module's output, over all batches."""
    rounded = {name: linear.weight for name, linear in subset.linears.items() if name in schemes}
    originals = {name: weight.clone() for name, weight in rounded.items()}
    losses = torch.zeros(len(candidates), dtype=torch.float64, device=candidates[0].device)

    def compare(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        expected = _first(output).float()
        for k, scales in enumerate(candidates):
            for name, weight in rounded.items():
                weight.copy_(rtn.fake(originals[name].float() * scales, schemes[name]).div_(scales))
            actual = _first(module.forward(*args, **kwargs)).float()  # not module(): that would call this hook
            losses[k] += (actual - expected).square_().sum()
        for name, weight in rounded.items():
            weight.copy_(originals[name])

    with _hooks([subset.inspected.register_forward_hook(compare, with_kwargs=True)]):
        run()
    return candidates[int(losses.nan_to_num(nan=torch.inf).argmin())]


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _scale(subset: Subset, scales: Tensor) -> None:
    """Multiply the linears' input channels, divide the output channels that they come from."""
    for linear in subset.linears.values():
        linear.weight.copy_(linear.weight.float() * scales)
    for parameter in (subset.previous.weight, getattr(subset.previous, "bias", None)):
        if parameter is not None:
            parameter.copy_(parameter.float() / (scales if parameter.ndim == 1 else scales.unsqueeze(1)))


def _grams(linears: dict[str, nn.Linear], run: Callable[[], None], schemes: dict[str, Scheme]) -> dict[str, Tensor]:
    """sum of x^T x over the inputs of each linear that ran, group by group: fp32 [groups, group size, group size]."""
    grams: dict[str, Tensor] = {}

    def add(name: str) -> Callable:
        def hook(module: nn.Linear, args: tuple) -> None:
            groups = schemes[name].groups(module.in_features)
            x = args[0].reshape(-1, groups, module.in_features // groups).float()
            gram = grams.setdefault(name, x.new_zeros(groups, x.shape[2], x.shape[2]))
            gram.baddbmm_(x.permute(1, 2, 0), x.permute(1, 0, 2))

        return hook

    with _hooks([linear.register_forward_pre_hook(add(name)) for name, linear in linears.items()]):
        run()
    return grams


def _clip(weight: Tensor, gram: Tensor, scheme: Scheme, options: AwqConfig) -> Tensor:
    """weight: fp32 [out, in], cut to the best range of each group."""
    clipped = torch.empty_like(weight)
    for rows, clipped_rows in zip(weight.split(ROWS), clipped.split(ROWS), strict=True):
        grouped = rows.view(len(rows), len(gram), -1)
        low, high = grouped.aminmax(dim=-1, keepdim=True)
        if options.clip_sym:
            high = torch.maximum(-low, high)
            low = -high
        least, best = torch.full_like(high, torch.inf), torch.ones_like(high)
        for i in range(options.n_grid // 2):
            share = 1 - i / options.n_grid
            cut = grouped.clamp(low * share, high * share)
            error = rtn.fake(cut.view_as(rows), scheme).view_as(grouped).sub_(grouped)
            loss = torch.einsum("rgi,gij->rgj", error, gram).mul_(error).sum(-1, keepdim=True)
            best = torch.where(loss < least, share, best)
            least = torch.minimum(loss, least)
        clipped_rows.copy_(grouped.clamp(low * best, high * best).view_as(rows))
    return clipped


@contextmanager
def _hooks(handles: list[RemovableHandle]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
