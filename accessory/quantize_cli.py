"""The command accessory-quantize: AutoRound's flags, keys as everywhere, or llmc's YAML."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from accessory.child import end_with_parent
from accessory.cli import launch, run_command
from accessory.composition import parse_override
from accessory.errors import UserError, first_line
from accessory.flags import MODEL_FLAGS, Flag, rewrite
from accessory.folders import require_folders
from accessory.quantize_options import QuantizeConfig
from accessory.schema import to_typed

LLMC_FLAG = "--config_path"
_IGNORED_SWITCHES = ("--disable_eval", "--mllm")
_IGNORED_VALUES = ("--llmc_tpu_path", "--platform", "--template")
_ELSEWHERE = {
    "--eval": "scripts/evaluate.py --pretrained_path <folder> --text FILE",
    "--task": "scripts/evaluate.py --pretrained_path <folder> --tasks lambada_openai",
    "--tasks": "scripts/evaluate.py --pretrained_path <folder> --tasks lambada_openai",
    "--eval_bs": "scripts/evaluate.py --pretrained_path <folder> --batch_size 1",
}

# AutoRound's names of all its versions; llmc's are keys of its YAML.
QUANTIZE_FLAGS = [
    *(flag for flag in MODEL_FLAGS if flag.name != "quant"),
    Flag("model", "model.pretrained_path", "list"),
    Flag("model_name", "model.pretrained_path", "list"),
    Flag("output_dir", "output_dir"),
    Flag("method", "method"),
    Flag("bits", "bits"),
    Flag("group_size", "group_size"),
    Flag("sym", "sym", "true"),
    Flag("asym", "sym", "false"),
    Flag("scheme", "scheme"),
    Flag("format", "format"),
    Flag("layer_config", "layer_config"),
    Flag("quant_lm_head", "quant_lm_head", "true"),
    Flag("quant_nontext_module", "vision", "true"),
    Flag("quant_vision", "vision", "true"),
    Flag("dataset", "calib.dataset"),
    Flag("question_file", "calib.dataset"),
    Flag("image_folder", "calib.image_root"),
    Flag("extra_data_dir", "calib.image_root"),
    Flag("nsamples", "calib.nsamples"),
    Flag("seqlen", "calib.seqlen"),
    Flag("seq_len", "calib.seqlen"),
    Flag("batch_size", "calib.batch_size"),
    Flag("train_bs", "calib.batch_size"),
    Flag("bs", "calib.batch_size"),
    Flag("recipe", "autoround.recipe"),
    Flag("iters", "autoround.iters"),
    Flag("lr", "autoround.lr"),
    Flag("minmax_lr", "autoround.minmax_lr"),
    Flag("enable_quanted_input", "autoround.enable_quanted_input", "true"),
    Flag("use_quant_input", "autoround.enable_quanted_input", "true"),
    Flag("disable_quanted_input", "autoround.enable_quanted_input", "false"),
    Flag("enable_minmax_tuning", "autoround.enable_minmax_tuning", "true"),
    Flag("disable_minmax_tuning", "autoround.enable_minmax_tuning", "false"),
    Flag("scale_dtype", "autoround.scale_dtype"),
    Flag("amp", "autoround.amp", "true"),
    Flag("disable_amp", "autoround.amp", "false"),
    Flag("nblocks", "autoround.nblocks"),
    Flag("gradient_accumulate_steps", "autoround.gradient_accumulate_steps"),
    Flag("adam", "autoround.adam", "true"),
    Flag("enable_adam", "autoround.adam", "true"),
    Flag("low_gpu_mem_usage", "low_gpu_mem_usage", "true"),
    Flag("device", "device"),
    Flag("device_map", "device"),
    Flag("precision", "precision"),
    Flag("seed", "seed"),
    Flag("text", "eval.text"),
]


def quantize_main() -> None:
    """accessory-quantize, scripts/quantize.py."""
    end_with_parent()
    run_command(lambda: sys.argv.__setitem__(slice(1, None), list(without_foreign_words(sys.argv[1:]))))
    is_llmc = any(word.partition("=")[0] == LLMC_FLAG for word in sys.argv[1:])
    if is_llmc and not {"--help", "-h"} & set(sys.argv[1:]):
        run_command(lambda: _quantize(_from_llmc(sys.argv[1:])))
    else:
        note = f"   or: {Path(sys.argv[0]).name} {LLMC_FLAG} FILE [--flag value …] [key=value …], with llmc's YAML"
        launch("quantize", QUANTIZE_FLAGS, QuantizeConfig, lambda node: run_command(lambda: _job(node)), note)


def _job(node: DictConfig) -> None:
    config = to_typed(node, QuantizeConfig)
    sweeps = HydraConfig.get().mode is RunMode.MULTIRUN
    if sweeps:
        config.output_dir = str(Path(config.output_dir) / str(HydraConfig.get().job.num))
    _quantize(config, repeated=sweeps)  # the same sweep once more goes on where it was stopped


def _quantize(config: QuantizeConfig, repeated: bool = False) -> None:
    require_folders(config.model.pretrained_path)
    from accessory.quantization.job import quantize_base
    from accessory.quantization.llava import is_llava_type, quantize_llava

    paths = config.model.pretrained_path
    if paths and is_llava_type(Path(paths[0]).expanduser()):
        run_command(lambda: quantize_llava(config), goes_on=False)
    else:
        quantize_base(config, repeated)


def without_foreign_words(words: list[str]) -> Iterator[str]:
    """The command line without the flags that mean nothing here."""
    rest = iter(words)
    for word in rest:
        name, has_value, _ = word.partition("=")
        if name in _ELSEWHERE:
            raise UserError(f"{name}: a quantized folder is evaluated by {_ELSEWHERE[name]}")
        if name in _IGNORED_VALUES:
            if not has_value:
                next(rest, None)
        elif name not in _IGNORED_SWITCHES:
            yield word


def _from_llmc(words: list[str]) -> QuantizeConfig:
    """llmc's YAML, and what the command line says besides."""
    from accessory.quantization.llmc import read_llmc

    flags = [*QUANTIZE_FLAGS, Flag(LLMC_FLAG.removeprefix("--"), "config_path")]
    overrides = [parse_override(word) for word in rewrite(words, flags)]
    path = next(override.value() for override in overrides if override.key_or_group == "config_path")
    node = OmegaConf.structured(read_llmc(str(path)))
    for override in overrides:
        if override.key_or_group != "config_path":
            try:
                OmegaConf.update(node, override.key_or_group, override.value())
            except OmegaConfBaseException as error:
                raise UserError(f"{override.key_or_group}: {first_line(error)}") from None
    return to_typed(node, QuantizeConfig)


ConfigStore.instance().store("quantize_schema", node=QuantizeConfig)
