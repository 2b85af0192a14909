"""One model, all methods: quantize a base by each, read every result back, and measure them by one protocol.

Each int4 method runs as a process of its own (scripts/quantize.py), so that nothing it leaves behind, memory or a
library's settings, reaches the next. What is there already is not made again.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Optional

from accessory.child import child_environment
from accessory.config import ModelConfig, Precision
from accessory.errors import UserError, first_line, suggest
from accessory.files import atomic_file
from accessory.models import read_json
from accessory.quantization.job.result import MANIFEST_FILE, own_options

QUANTIZE = Path(__file__).resolve().parents[1] / "scripts" / "quantize.py"
RESULT_FILE, TABLE_FILE, CHART_FILE = "comparison.json", "comparison.txt", "comparison.png"


@dataclass(frozen=True)
class Candidate:
    """on_load: the quantization that load_model applies to the base; without it, method, group_size and sym of the
    quantize job. cost: its time relative to measuring, for the time left."""

    title: str
    on_load: Optional[str] = None
    method: str = ""
    group_size: int = 64
    sym: bool = False
    cost: float = 1.0

    @property
    def is_calibrated(self) -> bool:
        return self.method in ("awq", "gptq", "autoround")


CANDIDATES = {
    "16bit": Candidate("16 bit", on_load="none"),
    "int8": Candidate("int8", on_load="int8"),
    "nf4": Candidate("NF4", on_load="nf4"),
    "rtn-g64-asym": Candidate("RTN g64 asym", method="rtn"),
    "rtn-g64-sym": Candidate("RTN g64 sym", method="rtn", sym=True),
    "awq-g64-asym": Candidate("AWQ g64 asym", method="awq", cost=6),
    "gptq-g64-asym": Candidate("GPTQ g64 asym", method="gptq", cost=3),
    "autoround-g128-sym": Candidate("AutoRound g128 sym", method="autoround", group_size=128, sym=True, cost=40),
}


@dataclass
class Comparison:
    """What is compared, on what. nsamples, seqlen, iters: of the calibration, None: as the quantize job chooses."""

    base: Path
    text: Path
    output: Path
    dataset: Optional[Path] = None
    methods: list[str] = field(default_factory=lambda: list(CANDIDATES))
    nsamples: Optional[int] = None
    seqlen: Optional[int] = None
    iters: Optional[int] = None
    max_tokens: int = -1
    eval_seqlen: int = 512
    batch_size: int = 4
    device: Optional[str] = None
    precision: Precision = Precision.bf16

    def settings(self, candidate: Candidate) -> dict[str, Any]:
        """What was chosen for this one, under the names of the quantize job's flags. A method's own group size is left
        out: the job then takes a smaller one where it does not divide a linear's inputs."""
        chosen: dict[str, Any] = {"method": candidate.method, "sym": candidate.sym}
        if candidate.group_size != (128 if candidate.method == "autoround" else 64):
            chosen["group_size"] = candidate.group_size
        if candidate.is_calibrated:
            chosen |= {"dataset": str(self.dataset.absolute()), "nsamples": self.nsamples, "seqlen": self.seqlen}
        if candidate.method == "autoround":
            chosen["iters"] = self.iters
        return {name: value for name, value in chosen.items() if value is not None}


@dataclass(frozen=True)
class Row:
    """seconds: of quantizing; of what is quantized on load, of loading. note: where the title is not the whole truth.
    error: why there are no figures."""

    name: str
    title: str
    ppl: Optional[float] = None
    tokens: Optional[int] = None
    memory_bytes: Optional[int] = None
    disk_bytes: Optional[int] = None
    seconds: Optional[float] = None
    folder: Optional[str] = None
    note: str = ""
    error: Optional[str] = None


def compare(what: Comparison, say: Callable[[str], None] = print) -> list[Row]:
    """A row for each method, in order; written after each as JSON and table, at the end as a chart. A method that fails
    becomes a row that says why."""
    _check(what)
    try:
        what.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {what.output}: cannot be written ({error.strerror})") from None
    rows: list[Row] = []
    costs = [_cost(what, name) for name in what.methods]
    began = time.monotonic()
    for i, name in enumerate(what.methods):
        candidate = CANDIDATES[name]
        say(f"[{i + 1}/{len(what.methods)}] {candidate.title} …")
        try:
            row = _row(what, name, candidate)
        except UserError as error:
            row = Row(name, candidate.title, error=str(error))
        except Exception as error:  # whatever it is, the others are to be measured all the same
            traceback.print_exc()
            row = Row(name, candidate.title, error=f"{type(error).__name__}: {first_line(error)}")
        rows.append(row)
        _write(what, rows)
        left = (time.monotonic() - began) / sum(costs[: i + 1]) * sum(costs[i + 1 :])
        wait = f"; about {_duration(left)} left" if left else ""
        say(f"      {row.error or f'ppl {row.ppl:.4f}'}{wait}")
    if any(row.ppl is not None for row in rows):
        from accessory.compare_chart import draw

        draw(rows, what.output / CHART_FILE, f"{what.base.resolve().name} on {what.text.name}")
    say("\n" + table(rows))
    return rows


def _check(what: Comparison) -> None:
    from accessory.bases import open_folder
    from accessory.evaluation import read_text, text_windows
    from accessory.models import find_device
    from accessory.models.tokenizer import require_tokenizer
    from accessory.sources import open_sources

    if unknown := [name for name in what.methods if name not in CANDIDATES]:
        raise UserError(f"--methods {unknown[0]}{suggest(unknown[0], CANDIDATES)}; known: {', '.join(CANDIDATES)}")
    if open_folder(what.base).packed:
        raise UserError(f"--pretrained_path {what.base}: is quantized itself; the comparison starts from a 16-bit base")
    if what.eval_seqlen < 2 or what.batch_size < 1:
        raise UserError(f"--eval_seqlen {what.eval_seqlen}, --batch_size {what.batch_size}: must be at least 2 and 1")
    find_device(what.device)
    tokenizer = require_tokenizer(open_sources(ModelConfig(pretrained_path=[str(what.base)])))
    text_windows(tokenizer, read_text(what.text), what.eval_seqlen, what.max_tokens)
    if any(CANDIDATES[name].is_calibrated for name in what.methods):
        if what.dataset is None:
            raise UserError("AWQ, GPTQ and AutoRound need --dataset FILE; --methods leaves them out")
        if not what.dataset.exists():
            raise UserError(f"--dataset {what.dataset}: no such file")


def _cost(what: Comparison, name: str) -> float:
    candidate = CANDIDATES[name]
    if candidate.on_load is not None or (what.output / name).is_dir():
        return 1
    tuned = 1 if candidate.method != "autoround" or what.iters is None else what.iters / 200
    return 1 + (candidate.cost - 1) * tuned


def _row(what: Comparison, name: str, candidate: Candidate) -> Row:
    if candidate.on_load is not None:
        return _measured(what, name, candidate, what.base)
    folder = what.output / name
    if not folder.is_dir():
        _quantize(what, candidate, folder)
    manifest = _manifest(folder, _wanted(what, candidate))
    sizes = {scheme["group_size"] for scheme in (manifest["scheme"], *manifest["exceptions"].values())}
    note = "" if sizes == {candidate.group_size} else f"groups of {' and '.join(map(str, sorted(sizes)))}"
    return replace(_measured(what, name, candidate, folder), seconds=manifest["seconds"], note=note)


def _quantize(what: Comparison, candidate: Candidate, folder: Path) -> None:
    """Make `folder`; what the job says lies beside it."""
    chosen = what.settings(candidate)
    switch = ["--sym" if chosen.pop("sym") else "--asym"]
    flags = {
        "pretrained_path": what.base,
        "output_dir": folder,
        "precision": what.precision.value,
        "device": what.device,
    }
    words = [
        word for flag, value in (flags | chosen).items() if value is not None for word in (f"--{flag}", str(value))
    ]
    log = folder.with_name(f"{folder.name}.log")
    with log.open("w") as output:
        command = [sys.executable, str(QUANTIZE), *words, *switch]
        code = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=child_environment()).returncode
    if code != 0 or not folder.is_dir():
        lines = log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
        told = [line for line in lines if line.startswith("error: ")] or lines
        raise UserError(f"{told[-1].removeprefix('error: ')} (see {log})")


def _wanted(what: Comparison, candidate: Candidate) -> dict[str, Any]:
    """What the manifest of a folder says that is made for this comparison: also of what was left to the job."""
    from accessory.bases import weights_digest
    from accessory.quantization.job.plan import fill_recipe, row_length
    from accessory.quantize_options import AutoRoundConfig, CalibrationConfig, Method, QuantizeConfig
    from accessory.sources import open_sources

    config = QuantizeConfig(
        method=Method(candidate.method),
        calib=CalibrationConfig(nsamples=what.nsamples, seqlen=what.seqlen),
        autoround=AutoRoundConfig(iters=what.iters),
    )
    fill_recipe(config)
    base = open_sources(ModelConfig(pretrained_path=[str(what.base)]))
    wanted = {"source": str(what.base.resolve()), "source_weights": weights_digest(base.folders[0])}
    wanted |= {"precision": what.precision.value, "bits": config.bits}
    wanted |= own_options(config) | what.settings(candidate)
    if candidate.is_calibrated:
        wanted |= {"nsamples": config.calib.nsamples, "seqlen": row_length(config, base.architecture)}
        wanted |= {"seed": config.seed}
    return json.loads(json.dumps(wanted))  # as a manifest gives it back


def _manifest(folder: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """What `folder` says of itself; it must have been made as `wanted`."""
    manifest = read_json(folder / MANIFEST_FILE)
    stated = manifest | manifest["scheme"] | manifest["options"] | (manifest["calibration"] or {})
    for name, value in wanted.items():
        if stated.get(name) != value:
            raise UserError(
                f"{folder} was made with {name}={stated.get(name)}, not {value}; remove it, or choose another --output"
            )
    return manifest


def _measured(what: Comparison, name: str, candidate: Candidate, folder: Path) -> Row:
    """Read the folder back, as any user would, and measure."""
    from accessory import load_model
    from accessory.bases import open_folder
    from accessory.evaluation import read_text, text_perplexity
    from accessory.models import find_device
    from accessory.models.tokenizer import require_tokenizer
    from accessory.precision import DTYPES
    from accessory.side_by_side import disk_bytes, free, memory_bytes

    start, on_load = time.monotonic(), candidate.on_load or "none"
    try:
        model = load_model(
            str(folder), quantization=on_load, device=find_device(what.device), dtype=DTYPES[what.precision]
        )
        require_tokenizer(model)
        seconds = None if on_load == "none" else time.monotonic() - start
        found = text_perplexity(model, read_text(what.text), what.eval_seqlen, what.max_tokens, what.batch_size)
        disk = disk_bytes([open_folder(folder)]) if on_load == "none" else None
        return Row(name, candidate.title, found.value, found.tokens, memory_bytes(model), disk, seconds, str(folder))
    finally:
        model = None
        free()


def _write(what: Comparison, rows: list[Row]) -> None:
    content: dict[str, Any] = {"settings": {k: _plain(v) for k, v in asdict(what).items()}}
    with atomic_file(what.output / RESULT_FILE) as partial:
        partial.write_text(json.dumps(content | {"rows": [asdict(row) for row in rows]}, indent=2) + "\n")
    with atomic_file(what.output / TABLE_FILE) as partial:
        partial.write_text(table(rows) + "\n")


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Precision) else str(value) if isinstance(value, Path) else value


def table(rows: list[Row]) -> str:
    """Figures of each method; `against` the row in 16 bit, where there is one."""
    reference = next((row.ppl for row in rows if row.name == "16bit"), None)
    lines = [f"{'method':<20}{'ppl':>12}{'against 16 bit':>16}{'memory MiB':>12}{'disk MiB':>10}{'seconds':>9}"]
    for row in rows:
        if row.error is not None:
            lines.append(f"{row.title:<20}  failed: {row.error}")
            continue
        against = "-" if reference is None else f"{row.ppl / reference - 1:+.2%}"
        sizes = ("-" if n is None else f"{n / 2**20:.1f}" for n in (row.memory_bytes, row.disk_bytes))
        memory, disk = sizes
        seconds = "-" if row.seconds is None else f"{row.seconds:.1f}"
        lines.append(
            f"{row.title:<20}{row.ppl:>12.4f}{against:>16}{memory:>12}{disk:>10}{seconds:>9}  {row.note}".rstrip()
        )
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 90
        else f"{seconds / 60:.0f} min"
        if seconds < 5400
        else f"{seconds / 3600:.1f} h"
    )
