"""llmc-tpu's YAML (base, model, calib, eval, quant, save, run) -> our configuration.

Every key of its documentation and templates is known here; one that is not, or a value that means nothing here, is an
error, and all errors of a file are told at once. llmc-tpu itself drops keys that its template lacks.

Where results lie, all below `save.save_path`, by llmc's names where it has one: quantized_model, transformed_model.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

import yaml

from accessory.config import LlamaType, ModelConfig
from accessory.errors import UserError, first_line, suggest
from accessory.quantization.calibration.sources import SAMPLES_FILE
from accessory.quantization.llmc.keys import DTYPES, GROUPS, KEYS, PREPROC, REQUIRED
from accessory.quantize_options import (
    AwqConfig,
    CalibrationConfig,
    EvalPosition,
    EvaluationConfig,
    GptqConfig,
    Method,
    QuantizeConfig,
    TransVersion,
)

QUANTIZED, TRANSFORMED = "quantized_model", "transformed_model"
METHODS = {"Awq": Method.awq, "GPTQ": Method.gptq, "RTN": Method.rtn}
SPECIAL = {"Awq": AwqConfig, "GPTQ": GptqConfig}
GPTQ_TEMPLATE = {"actorder": False, "static_groups": False}  # where llmc-tpu's template differs from our defaults


# --- the file --------------------------------------------------------------------------------------------------------


def read_llmc(path: str) -> QuantizeConfig:
    """llmc-tpu's YAML -> configuration; UserError names everything that is wrong with it."""
    file = Path(path).expanduser()
    problems: list[str] = []
    values: dict[str, Any] = {}
    for key, value in _settings("", _parse(file), problems):
        try:
            values[key] = KEYS[key](value)
        except ValueError as error:
            problems.append(f"{key}: {value}: {error}")
    stated = {problem.partition(":")[0] for problem in problems}
    problems += [f"{key}: not set" for key in REQUIRED if key not in values and key not in stated]
    problems += [f"{key}: {problem}" for key, problem in _rules(values) if key not in stated]
    if problems:
        raise UserError(f"{file}: {'; '.join(problems)}")
    return _build(values)


def _parse(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8-sig")
        _refuse_repeated(yaml.compose(text, Loader=yaml.SafeLoader), file)
        content = yaml.safe_load(text)
    except FileNotFoundError:
        raise UserError(f"--config_path {file}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config_path {file}: cannot be read ({first_line(error)})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{file}:{mark.line + 1}" if mark is not None else str(file)
        raise UserError(f"{where}: not valid YAML ({getattr(error, 'problem', None) or first_line(error)})") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: expected the sections {', '.join(_sections())}, found {str(content)[:40]!r}")
    return content


def _refuse_repeated(node: Any, file: Path) -> None:
    """Of a key that stands twice YAML's reader drops the first."""
    if isinstance(node, yaml.MappingNode):
        names = [key.value for key, _ in node.value]
        for key, value in node.value:
            if names.count(key.value) > 1:
                raise UserError(f"{file}:{key.start_mark.line + 1}: {key.value!r} stands there twice")
            _refuse_repeated(value, file)


def _sections() -> list[str]:
    return list(dict.fromkeys(key.partition(".")[0] for key in KEYS))


def _settings(group: str, content: dict[str, Any], problems: list[str]) -> Iterator[tuple[str, Any]]:
    """(section.key, value) of what is known and set."""
    for name, value in content.items():
        key = f"{group}.{name}" if group else str(name)
        if key in GROUPS:
            if isinstance(value, dict):
                yield from _settings(key, value, problems)
            elif value is not None:
                problems.append(f"{key}: {value}: expected settings below it")
        elif key not in KEYS:
            problems.append(f"{key}: unknown{_hint(group, str(name))}")
        elif value is not None:
            yield key, value


def _hint(group: str, name: str) -> str:
    if not group:
        return suggest(name, _sections())
    elsewhere = [key for key in KEYS if key.rpartition(".")[2] == name]
    near = [key.rpartition(".")[2] for key in KEYS if key.rpartition(".")[0] == group]
    return f" (it belongs to {elsewhere[0].rpartition('.')[0]})" if elsewhere else suggest(name, near)


# --- rules between keys ----------------------------------------------------------------------------------------------


def _rules(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(key, what is wrong) among values that are right by themselves."""
    yield from _weight_rules(values)
    if "quant.method" in values:
        yield from _method_rules(values)
    if "vision" in values.get("quant.quant_objects", ()) and values.get("run.task_type") == "LLM":
        yield "quant.quant_objects", "vision with task_type LLM; a model with images is a VLM"
    if "language" not in values.get("quant.quant_objects", ["language"]):
        yield "quant.quant_objects", "must be [language] or [vision, language]"
    if "transformed" in values.get("eval.eval_pos", ()) and not values.get("save.save_trans"):
        yield "eval.eval_pos", "transformed is measured on the saved floating-point model; set save.save_trans to True"
    yield from _path_rules(values)


def _method_rules(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    method = values["quant.method"]
    known = SPECIAL[method].__dataclass_fields__ if method in SPECIAL else {}
    for key in values:
        group, _, name = key.rpartition(".")
        if group == "quant.special" and name not in known:
            yield key, f"is no setting of {method}"
    if values.get("save.save_trans") and method != "Awq":
        yield "save.save_trans", f"True: {method} does not change the floating-point model, only Awq does; set False"
    if method in SPECIAL and "calib.path" not in values:
        yield "calib.path", "not set; name a file or folder"


def _weight_rules(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What TPU-MLIR computes with."""
    bit = values.get("quant.weight.bit")
    if bit is None:
        return
    if bit not in (4, 8):
        yield "quant.weight.bit", f"{bit}: must be 4 or 8"
        return
    weight = _weight(values)
    if weight["symmetric"] != (bit == 8):
        yield "quant.weight.symmetric", f"{weight['symmetric']}: must be {bit == 8} with {bit} bits"
    if bit == 8 and weight["granularity"] != "per_channel":
        yield "quant.weight.granularity", f"{weight['granularity']}: must be per_channel with 8 bits"
    if (weight["granularity"] == "per_channel") != (weight["group_size"] == -1):
        wanted = "-1" if weight["granularity"] == "per_channel" else "the weights of a group, 64 for TPU-MLIR,"
        yield "quant.weight.group_size", f"{weight['group_size']}: must be {wanted} with {weight['granularity']}"


def _weight(values: dict[str, Any]) -> dict[str, Any]:
    """quant.weight with its defaults."""
    is_8bit = values["quant.weight.bit"] == 8
    granularity = values.get("quant.weight.granularity", "per_channel" if is_8bit else "per_group")
    return {
        "symmetric": values.get("quant.weight.symmetric", is_8bit),
        "granularity": granularity,
        "group_size": values.get("quant.weight.group_size", -1 if granularity == "per_channel" else 64),
    }


def _path_rules(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if values.get("calib.name") == "images":
        yield "calib.name", "images: images alone calibrate no language model; use custom_mm, with questions"
    for key in ("calib.path", "eval.path"):
        if key in values and not Path(values[key]).expanduser().exists():
            yield key, f"{values[key]}: no such file or folder, and nothing is downloaded"
        elif key == "eval.path" and key in values and _text_file(values[key]) is None:
            yield key, f"{values[key]}: must be a text file, or a folder with {SAMPLES_FILE} or one .txt file"
    is_evaluated = any(key.startswith("eval.") for key in values) and values.get("eval.eval_pos") != []
    if is_evaluated and "eval.path" not in values:
        yield "eval.path", "not set; name a file or folder"
    if "save.save_path" in values and _is_taken(Path(values["save.save_path"]).expanduser()):
        yield "save.save_path", f"{values['save.save_path']}: exists already; name another, or remove it"


def _is_taken(folder: Path) -> bool:
    """Unless it holds nothing but interrupted work, which will be continued."""
    return folder.exists() and not (folder.is_dir() and {item.name[0] for item in folder.iterdir()} <= {"."})


def _text_file(path: str) -> Optional[str]:
    """The file itself, or the one that a folder holds for evaluation."""
    folder = Path(path).expanduser()
    if folder.is_file():
        return str(folder)
    if (folder / SAMPLES_FILE).is_file():
        return str(folder / SAMPLES_FILE)
    texts = list(folder.glob("*.txt"))
    return str(texts[0]) if len(texts) == 1 else None


# --- our configuration -----------------------------------------------------------------------------------------------


def _build(values: dict[str, Any]) -> QuantizeConfig:
    method, weight = METHODS[values["quant.method"]], _weight(values)
    special = {key.rpartition(".")[2]: value for key, value in values.items() if key.startswith("quant.special.")}
    if "trans_version" in special:
        special["trans_version"] = TransVersion(special["trans_version"])
    folder = Path(values["save.save_path"])
    return QuantizeConfig(
        model=ModelConfig(
            pretrained_path=values["model.path"],
            llama_type=LlamaType.llama_qformerv2_peft if values.get("run.task_type") == "VLM" else None,
        ),
        output_dir=str(folder / QUANTIZED),
        method=method,
        bits=values["quant.weight.bit"],
        group_size=weight["group_size"],
        sym=weight["symmetric"],
        vision="vision" in values.get("quant.quant_objects", ()),
        calib=_calibration(values, method),
        awq=AwqConfig(**special) if method is Method.awq else AwqConfig(),
        gptq=GptqConfig(**GPTQ_TEMPLATE | special) if method is Method.gptq else GptqConfig(),
        precision=DTYPES[values.get("model.torch_dtype", "auto")],
        seed=values.get("calib.seed", values.get("base.seed", 42)),
        save_trans=str(folder / TRANSFORMED) if values.get("save.save_trans") else None,
        eval=_evaluation(values),
    )


def _calibration(values: dict[str, Any], method: Method) -> CalibrationConfig:
    nsamples, batch_size = values.get("calib.n_samples", 128), values.get("calib.bs", 1)
    config = CalibrationConfig(
        dataset=values.get("calib.path"),
        nsamples=nsamples,
        seqlen=values.get("calib.seq_len", 2048 if method is Method.gptq else 512),
        batch_size=nsamples if batch_size == -1 else batch_size,
        allow_fewer=True,
        add_answer=values.get("calib.add_answer", values.get("run.task_type") == "VLM"),
        apply_chat_template=values.get("calib.apply_chat_template", False),
    )
    for name, value in PREPROC.get(values.get("calib.preproc"), {}).items():
        setattr(config, name, value)
    return config


def _evaluation(values: dict[str, Any]) -> EvaluationConfig:
    if not any(key.startswith("eval.") for key in values):
        return EvaluationConfig()
    config = EvaluationConfig(seqlen=values.get("eval.seq_len", 2048), batch_size=values.get("eval.bs", 1))
    if "eval.path" in values:
        config.text = _text_file(values["eval.path"])
    config.name = values.get("eval.name")
    if "eval.eval_pos" in values:
        config.eval_pos = [EvalPosition(position) for position in values["eval.eval_pos"]]
    return config
