"""One model, all methods: rows against separate runs, what is reused, and what a failure leaves standing."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import corpus
from hydra import compose, initialize_config_dir

import accessory
from accessory import compare as module
from accessory.bases import open_folder, weights_digest
from accessory.compare import CANDIDATES, Comparison, Row, compare, table
from accessory.compare_chart import draw
from accessory.config import ModelConfig, Precision
from accessory.errors import UserError
from accessory.evaluation import text_perplexity
from accessory.flags import rewrite
from accessory.quantization.job import quantize_base
from accessory.quantization.job.plan import fill_recipe
from accessory.quantization.job.result import own_options
from accessory.quantize_cli import QUANTIZE_FLAGS
from accessory.quantize_options import CalibrationConfig, Method, QuantizeConfig
from accessory.shipped import CONFIG_DIR

TEXT = "\n".join(corpus()[:40])


@pytest.fixture
def what(tmp_path, hf_folder):
    """A comparison on 32 windows; methods and settings as given."""
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "calibration.txt").write_text("\n".join(corpus()[40:]))

    def make(*methods: str, **settings) -> Comparison:
        files = {"text": tmp_path / "text.txt", "dataset": tmp_path / "calibration.txt"} | settings
        usual = {"eval_seqlen": 32, "device": "cpu", "precision": Precision.tf32}
        return Comparison(base=hf_folder, output=tmp_path / "compared", methods=list(methods), **usual | files)

    return make


@pytest.fixture
def job(monkeypatch, hf_folder):
    """The quantize job, faked: what it makes is the base itself and a manifest, unless it `fails` with a method."""
    made = SimpleNamespace(commands=[], fails=None, group_size=64, exceptions={})

    def run(command: list[str], stdout, **_) -> subprocess.CompletedProcess:
        words = dict(zip(command[2:-1:2], command[3:-1:2], strict=True))
        made.commands.append(command)
        if words["--method"] == made.fails:
            stdout.write("loading\nerror: group_size=128 does not divide 64\n")
            return subprocess.CompletedProcess(command, 2)
        folder = Path(shutil.copytree(hf_folder, words["--output_dir"]))
        calibration = {"dataset": words.get("--dataset"), "nsamples": int(words.get("--nsamples", 128)), "seed": 42}
        calibration |= {"seqlen": int(words.get("--seqlen", 256))}  # the model's positions
        size = int(words.get("--group_size", made.group_size))
        scheme = {"bits": 4, "group_size": size, "sym": command[-1] == "--sym"}
        config = QuantizeConfig(method=Method(words["--method"]))
        config.autoround.iters = int(words["--iters"]) if "--iters" in words else None
        fill_recipe(config)
        manifest = {"method": words["--method"], "scheme": scheme, "calibration": calibration}
        manifest |= {"options": own_options(config), "precision": words["--precision"]}
        manifest |= {
            "source": str(hf_folder),
            "source_weights": weights_digest(open_folder(hf_folder)),
            "seconds": 12.5,
            "exceptions": made.exceptions,
        }
        (folder / "quantization.json").write_text(json.dumps(manifest))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(module.subprocess, "run", run)
    return made


def expected(base: Path, quantization: str) -> float:
    return text_perplexity(accessory.load_model(str(base), quantization=quantization), TEXT, 32).value


def test_rows_are_what_separate_runs_give(what, hf_folder):
    rows = compare(what("16bit", "nf4"))
    assert [row.ppl for row in rows] == [expected(hf_folder, "none"), expected(hf_folder, "nf4")]
    assert rows[0].ppl != rows[1].ppl
    assert rows[1].memory_bytes < rows[0].memory_bytes
    assert rows[0].disk_bytes == (hf_folder / "model.safetensors").stat().st_size
    assert rows[1].disk_bytes is None and rows[1].seconds > 0


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"eval_seqlen": 1}, "--eval_seqlen 1, --batch_size 4: must be at least 2 and 1"),
        ({"eval_seqlen": 10**6}, "fewer than one window"),
        ({"device": "gpu"}, "--device gpu: unknown device"),
    ],
)
def test_what_cannot_be_measured_is_told_before_anything_is_quantized(settings, complaint, what, job):
    with pytest.raises(UserError, match=complaint):
        compare(what("gptq-g64-asym", **settings))
    assert job.commands == []


def test_a_base_that_has_changed_is_another_base(what, job, monkeypatch):
    compare(what("gptq-g64-asym"))
    monkeypatch.setattr("accessory.bases.weights_digest", lambda base: "another")
    (row,) = compare(what("gptq-g64-asym"))
    assert "was made with source_weights=" in row.error


def test_default_is_every_method_of_the_brief():
    assert Comparison(Path("b"), Path("t"), Path("o")).methods == [
        *("16bit", "int8", "nf4", "rtn-g64-asym", "rtn-g64-sym"),
        *("awq-g64-asym", "gptq-g64-asym", "autoround-g128-sym"),
    ]


def test_quantize_job_is_told_method_scheme_and_calibration(what, job):
    settings = what("rtn-g64-sym", "gptq-g64-asym", "autoround-g128-sym", nsamples=4, seqlen=16, iters=3)
    compare(settings)
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        told = [compose("quantize", rewrite(command[2:], QUANTIZE_FLAGS)) for command in job.commands]
    assert [(t.method, t.group_size, t.sym) for t in told] == [
        ("rtn", None, True), ("gptq", None, False), ("autoround", None, True)
    ]  # fmt: skip
    assert [t.calib.dataset for t in told] == [None, str(settings.dataset), str(settings.dataset)]
    assert [(t.calib.nsamples, t.calib.seqlen) for t in told] == [(None, None), (4, 16), (4, 16)]
    assert [t.autoround.iters for t in told] == [None, None, 3]
    assert {(*t.model.pretrained_path, t.device, t.precision.value) for t in told} == {
        (str(settings.base), "cpu", "tf32")
    }
    assert told[0].output_dir == str(settings.output / "rtn-g64-sym")


def test_result_is_read_back_and_measured(what, job, hf_folder):
    (row,) = compare(what("gptq-g64-asym"))
    assert row.ppl == expected(hf_folder, "none")
    assert row.folder == str(what().output / "gptq-g64-asym")


def test_folders_that_are_there_are_reused(what, job):
    (first,) = compare(what("gptq-g64-asym", nsamples=4))
    (again, _) = compare(what("gptq-g64-asym", "awq-g64-asym", nsamples=4))
    assert len(job.commands) == 2
    assert again == first
    assert first.seconds == 12.5


def test_groups_that_had_to_be_smaller_are_noted(what, job):
    job.group_size = 64
    job.exceptions = {"model.layers.0.mlp.down_proj": {"bits": 4, "group_size": 128, "sym": True}}
    (row,) = rows = compare(what("autoround-g128-sym"))
    assert row.note == "groups of 64 and 128"
    assert table(rows).endswith(row.note)


@pytest.mark.parametrize(
    ("before", "now", "told"),
    [
        ({"nsamples": 4}, {"nsamples": 8}, "nsamples=4, not 8"),
        ({"nsamples": 4}, {}, "nsamples=4, not 128"),
        ({"seqlen": 16}, {}, "seqlen=16, not 256"),
        ({}, {"precision": Precision.bf16}, "precision=tf32, not bf16"),
        ({"iters": 3}, {}, "iters=3, not 200"),
    ],
)
def test_folder_made_with_other_settings_is_not_taken_for_these(before, now, told, what, job):
    compare(what("autoround-g128-sym", **before))
    (row,) = compare(what("autoround-g128-sym", **now))
    assert f"autoround-g128-sym was made with {told}; remove it, or choose another --output" in row.error
    assert len(job.commands) == 1


def test_folder_that_the_job_itself_made_with_these_settings_is_reused(what, monkeypatch):
    monkeypatch.setattr(module.subprocess, "run", lambda *_, **__: pytest.fail("quantized again"))
    settings = what("gptq-g64-asym", nsamples=8, seqlen=16)
    calib = CalibrationConfig(dataset=str(settings.dataset), nsamples=8, seqlen=16)
    folder, model = settings.output / "gptq-g64-asym", ModelConfig(pretrained_path=[str(settings.base)])
    quantize_base(
        QuantizeConfig(model, str(folder), Method.gptq, calib=calib, precision=Precision.tf32, device="cpu", sym=False)
    )
    (row,) = compare(settings)
    assert row.error is None and row.folder == str(folder)


def test_method_that_fails_is_a_row_and_the_others_go_on(what, job, hf_folder, capsys):
    job.fails = "awq"
    rows = compare(what("awq-g64-asym", "16bit", "gptq-g64-asym"))
    assert rows[0].error.startswith("group_size=128 does not divide 64 (see ")
    assert [row.ppl for row in rows[1:]] == [expected(hf_folder, "none")] * 2
    printed = capsys.readouterr().out
    assert "AWQ g64 asym          failed: group_size=128 does not divide 64" in printed
    assert "[2/3] 16 bit …" in printed and " left" in printed


def test_figures_are_written_as_json_table_and_chart(what, job):
    job.fails = "awq"
    settings = what("16bit", "nf4", "awq-g64-asym")
    rows = compare(settings)
    content = json.loads((settings.output / "comparison.json").read_text())
    assert [Row(**row) for row in content["rows"]] == rows
    assert content["settings"]["eval_seqlen"] == 32
    assert (settings.output / "comparison.txt").read_text() == table(rows) + "\n"
    assert (settings.output / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_what_was_measured_before_an_interruption_is_on_the_disk(what, monkeypatch):
    settings = what("16bit", "nf4")
    measured = module._measured
    monkeypatch.setattr(
        module, "_measured", lambda what, name, *rest: measured(what, name, *rest) if name == "16bit" else interrupt()
    )

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(settings)
    assert [row["name"] for row in json.loads((settings.output / "comparison.json").read_text())["rows"]] == ["16bit"]


def test_table_compares_with_the_row_in_16_bit():
    rows = [Row("16bit", "16 bit", 10.0, 5, 2**21, 2**20), Row("nf4", "NF4", 12.5, 5, 2**20, None, 3.2)]
    _, first, second = (line.split() for line in table(rows).splitlines())
    assert first == ["16", "bit", "10.0000", "+0.00%", "2.0", "1.0", "-"]
    assert second == ["NF4", "12.5000", "+25.00%", "1.0", "-", "3.2"]


def test_bars_are_sorted_by_perplexity_with_a_line_at_16_bit(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, file, **_: drawn.append(self) or file.write_bytes(b"png"))
    rows = [
        Row("nf4", "NF4", 12.5, 5, 2**20, None, 3.2),
        Row("16bit", "16 bit", 10.0, 5, 2**21, 2**20),
        Row("awq-g64-asym", "AWQ g64 asym", 11.0, 5, 2**20, 2**20, 80),
        Row("int8", "int8", error="no"),
    ]
    draw(rows, tmp_path / "chart.png", "model on text")
    (axes,) = drawn[0].axes
    assert [bar.get_width() for bar in axes.patches] == [12.5, 11.0, 10.0]  # from the bottom
    assert [label.get_text() for label in axes.get_yticklabels()] == ["NF4", "AWQ g64 asym", "16 bit"]
    assert list(axes.lines[0].get_xdata()) == [10.0, 10.0]
    written = [text.get_text() for text in axes.texts]
    assert {"11.00", "+10.0%", "1.0 MiB", "80.0 s"} <= set(written)
    assert "failed: int8" in axes.get_xlabel()


@pytest.mark.parametrize(
    ("methods", "settings", "complaint"),
    [
        (["gptq-g64-sym"], {}, r"--methods gptq-g64-sym \(did you mean gptq-g64-asym\?\); known: 16bit, int8"),
        (["awq-g64-asym"], {"dataset": None}, "AWQ, GPTQ and AutoRound need --dataset FILE"),
        (["awq-g64-asym"], {"dataset": Path("nowhere.txt")}, "--dataset nowhere.txt: no such file"),
        (["16bit"], {"text": Path("nowhere.txt")}, "--text nowhere.txt: no such file"),
    ],
)
def test_what_cannot_be_compared_is_refused_at_once(methods, settings, complaint, what):
    with pytest.raises(UserError, match=complaint):
        compare(what(*methods, **settings))


def test_rtn_runs_end_to_end_and_its_row_is_a_run_of_its_own(what, hf_folder):
    settings = what("16bit", "rtn-g64-asym")
    base, rtn = compare(settings)
    assert rtn.error is None
    found = accessory.load_model(str(settings.output / "rtn-g64-asym"))
    assert rtn.ppl == text_perplexity(found, TEXT, 32).value != base.ppl
    assert rtn.disk_bytes < base.disk_bytes and rtn.memory_bytes < base.memory_bytes
    with pytest.raises(UserError, match=r"rtn-g64-asym: is quantized itself; the comparison starts from a 16-bit base"):
        compare(replace(settings, base=settings.output / "rtn-g64-asym"))


def test_titles_are_unique():
    assert len({candidate.title for candidate in CANDIDATES.values()}) == len(CANDIDATES)
