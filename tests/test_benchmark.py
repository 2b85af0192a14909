"""The benchmark beside the peers: its turns, what becomes of a system that fails, and the document it writes."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

import benchmark
import benchmark_driver as driver
import benchmark_lengths as lengths
import benchmark_machine as machine
import benchmark_profile as profiling
import benchmark_report as report
from benchmark_cases import SHAPES, can_do, complete, flops_per_token, grouped, issue_preset, linear_shapes

SCRIPTS = Path(driver.__file__).parent


def case(**changes) -> dict:
    asked = {
        "task": "train", "model": "tiny", "recipe": "norm_bias", "base": "nf4", "images": None, "batch": 2,
        "length": 32, "checkpointing": False, "compile": False,
    }  # fmt: skip
    return complete(asked | changes, ["ours", "plain"], steps=4, warmup=1) | {"round": 2}


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> dict:
    """Of real processes: a case of both systems, and one in which a system cannot be."""
    folder = tmp_path_factory.mktemp("benchmark")
    broken = case(checkpointing=True) | {"systems": ["ours", "plain", "nobody"]}
    return {
        "logs": folder,
        "cases": list(driver.measure_all([case(), broken], folder)),
    }


def test_systems_take_turns_and_never_compute_at_once(measured):
    rows = measured["cases"][0]
    turns = sorted((*turn, row["system"]) for row in rows for turn in row["turns"])
    assert [system for _, _, system in turns] == ["ours", "plain", "plain", "ours"]
    assert all(ended <= began for (_, ended, _), (began, _, _) in itertools.pairwise(turns))


def test_every_timed_step_counts_and_each_round_is_compared(measured):
    ours, plain = measured["cases"][0]
    for row in (ours, plain):
        assert len(row["seconds"]) == 4 and row["tokens"] == [64] * 4
        low, high = row["ms_quartiles"]
        assert row["ms_range"][0] <= low <= row["ms_per_step"] <= high <= row["ms_range"][1]
        assert row["tokens_per_s"] == pytest.approx(64 / row["ms_per_step"] * 1000)
    expected = [a / b for a, b in zip(ours["round_tokens_per_s"], plain["round_tokens_per_s"], strict=True)]
    assert plain["ours_over_this"] == pytest.approx(expected) and len(expected) == 2


def test_a_system_that_fails_is_a_line_and_the_rest_goes_on(measured):
    rows = {row["system"]: row for row in measured["cases"][1]}
    assert rows["nobody"]["error"] == "KeyError: 'nobody'"
    assert "error" not in rows["ours"] and "error" not in rows["plain"]
    assert "nobody" in report.line(rows["nobody"]) and "failed: KeyError" in report.line(rows["nobody"])


def test_a_process_that_dies_is_reported_with_its_last_line(tmp_path, monkeypatch):
    script = tmp_path / "benchmark_worker.py"
    script.write_text("import sys\nsys.exit('the card is gone')\n")
    monkeypatch.setattr(driver, "__file__", str(tmp_path / "benchmark_driver.py"))
    (rows,) = driver.measure_all([case()], tmp_path / "logs")
    assert [row["error"] for row in rows] == ["ended: the card is gone"] * 2


def fake_worker(tmp_path: Path, monkeypatch, program: str) -> None:
    head = "import json, sys\nspec = json.loads(sys.argv[1])\nsend = lambda r: print(json.dumps(r), flush=True)\n"
    (tmp_path / "benchmark_worker.py").write_text(head + program)
    monkeypatch.setattr(driver, "__file__", str(tmp_path / "benchmark_driver.py"))


def test_where_memory_is_short_for_all_at_once_each_lets_go_after_its_turn(tmp_path, monkeypatch):
    fake_worker(
        tmp_path,
        monkeypatch,
        """
import os
held = os.path.join(os.path.dirname(__file__), "held-by-")
send({"imported": True})
for line in sys.stdin:
    request = json.loads(line)
    mine, other = held + spec["system"], held + ("plain" if spec["system"] == "ours" else "ours")
    if request["do"] == "build":
        send({"build_s": 0, "trainable": 1, "held_gib": 1, "notes": []})
    elif request["do"] == "release":
        os.path.exists(mine) and os.remove(mine)
        send({})
    elif os.path.exists(other):
        send({"error": "out of memory", "oom": True})
    else:
        open(mine, "w").close()
        send({"seconds": [0.5] * request["count"], "tokens": [64] * request["count"], "peak_gib": 1, "loss": 0})
""",
    )
    (rows,) = driver.measure_all([case()], tmp_path / "logs")
    assert all(row["crowded"] and row["tokens_per_s"] == 128 for row in rows)


def test_after_the_deadline_no_case_is_begun(tmp_path, monkeypatch):
    fake_worker(tmp_path, monkeypatch, "send({'imported': True})\nsys.stdin.read()\n")
    (rows,) = driver.measure_all([case()], tmp_path / "logs", deadline=0)
    assert {row["error"] for row in rows} == {"not begun: no time left"}


def results(rows: list[dict]) -> dict:
    machine = {
        "driver": None, "python": "3.12", "cores": 2, "versions": {"torch": "2.11", "litgpt": None}, "commit": "abc",
        "device": "CPU (x86)", "memory_gib": None, "matmul_tflops": {"512 512 512": 0.1}, "square": 512,
        "copy_gb_s": 10.0,
    }  # fmt: skip
    return {
        "date": "2026-01-01",
        "command": "python scripts/benchmark.py --steps 4",
        "machine": machine,
        "results": rows,
    }


def test_the_report_replaces_what_stands_between_the_marks_alone(measured, tmp_path):
    source, document = tmp_path / "results.json", tmp_path / "docs" / "performance.md"
    source.write_text(json.dumps(results([row for rows in measured["cases"] for row in rows])))
    report.write(document, [source])
    document.write_text(
        document.read_text().replace(report.BEGIN, f"My own words.\n\n{report.BEGIN}") + "\nAnd these.\n"
    )
    report.write(document, [source])
    text = document.read_text()
    assert text.count("My own words.") == 1 and text.endswith("And these.\n") and text.count("# Speed and memory") == 1
    ours, plain = measured["cases"][0]
    assert f"| TINY NF4 `norm_bias`, 2 x 32 | ours | {ours['tokens_per_s']:,.0f} |" in text
    assert f"{plain['ms_per_step']:,.1f} (" in text and "KeyError: 'nobody'" in text
    assert "python scripts/benchmark.py --steps 4" in text and "torch 2.11" in text and "litgpt None" not in text
    tables = [line for line in text.splitlines() if line.startswith("| ")]
    assert {line.count("|") for line in tables if "TFLOP/s" not in line and " x " in line and "`" in line} == {8}


def test_the_report_names_what_a_warm_gpu_reached_in_the_runs_that_measured_it(measured, tmp_path):
    files = []
    for name, sustained in (("first", None), ("second", 0.08), ("third", 0.0912)):
        run = results([row for rows in measured["cases"] for row in rows])
        run["machine"] |= {} if sustained is None else {"sustained_tflops": sustained}
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(json.dumps(run))
    report.write(tmp_path / "all.md", files)
    report.write(tmp_path / "one.md", files[:1])
    assert (
        "ran at 0.1, 0.1, 0.1 TFLOP/s (after seconds of it, -, 0.08, 0.0912), and memory"
        in (tmp_path / "all.md").read_text()
    )
    assert "ran at 0.1 TFLOP/s, and memory" in (tmp_path / "one.md").read_text()


def test_a_document_without_marks_is_left_alone(tmp_path):
    document = tmp_path / "performance.md"
    document.write_text("# Mine\n")
    with pytest.raises(SystemExit, match="has no lines"):
        report.write(document, [])
    assert document.read_text() == "# Mine\n"


def test_the_preset_asks_of_no_peer_what_it_does_not_offer():
    cases = issue_preset(["ours", "plain", "litgpt", "unsloth"], compiled=True)
    for wanted in cases:
        assert wanted["systems"][0] == "ours"
        if wanted["offload"] and not wanted["checkpointing"]:
            assert wanted["systems"] == ["ours"]
            continue
        assert ("litgpt" in wanted["systems"]) == (wanted["base"] == "nf4" and "lora" in wanted["recipe"])
        assert wanted["systems"] == ["ours"] or wanted["base"] == "nf4"
        assert wanted["steps"] >= 20 or wanted["task"] == "generate"
    assert {wanted["model"] for wanted in cases} == {"7b", "70b"} and len(grouped(cases)) == 6
    assert not can_do("plain", case(images="nf4"))


def test_operations_of_a_token_are_those_of_the_weights():
    weights = sum(out * width for out, width in linear_shapes("7b").values()) * SHAPES["7b"][2]
    assert weights == 6_476_005_376  # LLaMA2-7B's 6.74 billion, less embedding, output layer and norms
    assert flops_per_token(case(model="7b")) == pytest.approx(4 * weights, rel=0.03)
    assert flops_per_token(case(model="7b", checkpointing=True)) == pytest.approx(6 * weights, rel=0.02)


def test_packed_and_padded_rows_hold_the_same_items(tmp_path):
    file = tmp_path / "lengths.json"
    pairs = [[10, 4], [7, 2], [16, 9], [5, 1], [12, 11], [3, 1]]
    file.write_text(json.dumps({"source": "", "max_words": 16, "pairs": pairs}))
    asked = case(task="lengths", batch=3, length=16) | {"lengths": str(file)}
    answers = sum(answer for _, answer in pairs)
    padded = [lengths.padded_rows(asked, 100, number) for number in range(2)]
    assert sum(count for _, count in padded) == answers
    for batch, count in padded:
        assert int((batch["labels"][:, 1:] != -100).sum()) == count
        assert bool((batch["input_ids"][batch["labels"] != -100] == batch["labels"][batch["labels"] != -100]).all())
    rows = len(lengths._packed(str(file), 16))
    packed = [lengths.packed_rows(asked | {"batch": 1}, 100, number) for number in range(rows)]
    assert sum(count for _, count in packed) == answers
    assert all(batch["input_ids"].shape == (1, 16) for batch, _ in packed)


def test_the_command_runs_anywhere_and_writes_what_the_report_reads(tmp_path):
    output, document = tmp_path / "results.json", tmp_path / "performance.md"
    command = [sys.executable, str(SCRIPTS / "benchmark.py")]
    flags = "--models tiny --recipes norm_bias --steps 2 --warmup 1 --batches 1 --length 16 --systems ours".split()
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run([*command, *flags, "--output", str(output)], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1].startswith("ours")
    subprocess.run([*command, "--report", str(document), str(output)], check=True, env=environment)
    assert "| TINY NF4 `norm_bias`, 1 x 16 | ours |" in document.read_text()


def test_a_host_of_several_gpus_has_one_driver(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nprintf '580.1\\n580.1\\n'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.driver() == "580.1"


def test_the_command_that_is_reported_names_no_folder():
    words = ["--preset", "issue", "--output", "/somewhere/r.json", "--models", "7b", "--commit=abc", "--steps", "5"]
    assert benchmark.repeatable(words) == ["--preset", "issue", "--models", "7b", "--steps", "5"]


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_NNT", "matrix products"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float>", "matrix products"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, cutlass::bfloat16_t>>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26", "attention"),
        ("void kDequantizeBlockwise<__nv_bfloat16, 512, 64, 8, 2>", "16-bit weights"),
        ("_nf4_weight", "16-bit weights"),
        ("_int4_weight", "16-bit weights"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedOptimizerTensorListMetadata<4>>",
         "optimizer, clipping, 16-bit copies"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_0", profiling.REST),
        ("_norm_backward", profiling.REST),
    ],
)  # fmt: skip
def test_a_kernels_name_says_what_it_does(kernel, kind):
    assert profiling.kind_of(kernel) == kind


def test_a_profiled_step_is_a_line_by_kind_with_what_the_gpu_waits(measured, tmp_path):
    row = dict(measured["cases"][0][0], ms_per_step=10.0)
    row["profile"] = profiling.add_up(
        [
            ("nvjet_a", 0.0, 1500.0),
            ("nvjet_a", 4000.0, 6500.0),
            ("_nf4_weight", 1500.0, 3500.0),
            ("Memcpy", 1000.0, 4500.0),
        ]
    )
    assert row["profile"]["longest"][0] == ["nvjet_a", 2, 4.0] and row["profile"]["kernels"] == 4
    document = tmp_path / "performance.md"
    source = tmp_path / "results.json"
    source.write_text(json.dumps(results([row])))
    report.write(document, [source])
    lines = document.read_text().split("### Where a step's time goes, ms")[1].strip().splitlines()
    head, figures = ([cell.strip() for cell in lines[i].strip("|").split("|")] for i in (0, 2))
    found = dict(zip(head, figures, strict=True))
    assert found["kernels"] == "4" and found["matrix products"] == "4.0" and found["16-bit weights"] == "2.0"
    assert found["idle"] == "3.5" and found["attention"] == "0.0"


def test_a_profile_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--profile"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="GPU"):
        benchmark.chosen(benchmark.arguments())
