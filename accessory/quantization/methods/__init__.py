"""Blocks in floating point -> their linears in whole numbers, by each of the methods."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from accessory.quantization import rtn
from accessory.quantization.methods import awq, gptq
from accessory.quantization.packed import Packed, Scheme
from accessory.quantize_options import GptqConfig, Method, QuantizeConfig


class Chain(nn.ModuleList):
    """Modules that follow each other; a module's path begins with its place: 0.mlp.down_proj."""


@dataclass(frozen=True)
class Calibration:
    """What a block is calibrated on. reference: outputs of the blocks before in floating point; inputs: the same with
    those blocks quantized; both a list of batches [b, s, d]. call: how a block is called on a batch."""

    reference: list[Tensor]
    inputs: list[Tensor]
    call: Callable[[nn.Module, Tensor], Tensor]
    device: torch.device

    def run(self, blocks: Chain) -> None:
        """Show the blocks all quantized inputs."""
        for batch in self.inputs:
            x = batch.to(self.device)
            for block in blocks:
                x = self.call(block, x)


def quantize_unit(
    blocks: Chain, schemes: dict[str, Scheme], calibration: Calibration, config: QuantizeConfig
) -> dict[str, Packed]:
    """blocks: with nn.Linears, whose weights are changed in place (awq scales and clips them, and the norms); schemes:
    of the linears to quantize, by name in the chain. Returns those linears' weights in whole numbers."""
    if not schemes:  # layer_config leaves them all in 16 bit
        return {}
    linears = {name: blocks.get_submodule(name) for name in schemes}
    if config.method is Method.gptq:
        return _gptq(blocks, linears, schemes, calibration, config.gptq)
    if config.method is Method.autoround:
        from accessory.quantization.methods.autoround import tune  # which patches transformers

        return tune(blocks, schemes, calibration, config)
    if config.method is Method.awq:
        _awq(blocks, schemes, calibration, config)
    return {name: rtn.quantize(linear.weight, schemes[name]) for name, linear in linears.items()}


def _awq(blocks: Chain, schemes: dict[str, Scheme], calibration: Calibration, config: QuantizeConfig) -> None:
    (block,) = blocks
    if not isinstance(block, nn.Linear):  # the output layer has no norm of its own block in front to take a scale
        own = {name.removeprefix("0."): scheme for name, scheme in schemes.items()}
        awq.adjust(block, lambda: calibration.run(blocks), own, config.awq)


def _gptq(
    blocks: Chain,
    linears: dict[str, nn.Linear],
    schemes: dict[str, Scheme],
    calibration: Calibration,
    options: GptqConfig,
) -> dict[str, Packed]:
    """Group after group of linears that share an input, each seeing the earlier ones rounded (true_sequential)."""
    packed: dict[str, Packed] = {}
    groups = _input_groups(blocks, linears, calibration)
    for together in groups if options.true_sequential else [[name for group in groups for name in group]]:
        hessians = _hessians(blocks, {name: linears[name] for name in together}, groups, calibration)
        for name in together:
            linear = linears[name]
            packed[name] = gptq.quantize(linear.weight, hessians[name], schemes[name], options)
            linear.weight.data.copy_(packed[name].dequantize(linear.weight.dtype))
    return packed


def _input_groups(blocks: Chain, linears: dict[str, nn.Linear], calibration: Calibration) -> list[list[str]]:
    """The linears in the order of their calls, those with one input together."""
    groups: list[tuple[Tensor, list[str]]] = []

    def hook(name: str) -> Callable:
        def see(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if groups and groups[-1][0] is args[0]:
                groups[-1][1].append(name)
            else:
                groups.append((args[0], [name]))

        return see

    handles = [linear.register_forward_pre_hook(hook(name)) for name, linear in linears.items()]
    replace(calibration, inputs=[calibration.inputs[0][:1]]).run(blocks)
    for handle in handles:
        handle.remove()
    return [names for _, names in groups]


def _hessians(
    blocks: Chain, linears: dict[str, nn.Linear], groups: list[list[str]], calibration: Calibration
) -> dict[str, gptq.Hessian]:
    """The Hessian of each linear; linears with one input share it."""
    found: dict[str, gptq.Hessian] = {}
    handles = []
    for group in groups:
        wanted = [name for name in group if name in linears]
        if wanted:
            linear = linears[wanted[0]]
            hessian = gptq.Hessian(linear.in_features, linear.weight.device)
            handles.append(linear.register_forward_pre_hook(lambda module, args, hessian=hessian: hessian.add(args[0])))
            found |= dict.fromkeys(wanted, hessian)
    calibration.run(blocks)
    for handle in handles:
        handle.remove()
    return found
