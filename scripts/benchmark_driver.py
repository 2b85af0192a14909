"""Lets the systems compute in turns, and puts their figures together.

All processes start at once, since importing takes longer than measuring. Then, group by group: the group's systems
build their models, and each case is done in rounds, a few steps of every system in each, the first one changing from
round to round, so that a drift of the machine meets all alike. What fails is a line with its reason; the rest goes on.

Where models and activations of several systems do not fit into the memory together, the case is done again `crowded`:
each lets go of all but its model after its turn, and warms up again before the next.
"""

from __future__ import annotations

import json
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

from benchmark_cases import Case, group_of, grouped

ANSWER_SECONDS = 300
Row = dict[str, Any]


class Process:
    """A worker; after `error` is set it is gone."""

    def __init__(self, system: str, group: dict[str, Any], logs: Path):
        self.system, self.error, self.built = system, None, {}
        self.log = logs / f"{system}-{group['model']}-{group['recipe']}-{group['base']}.log"
        self._log_file = self.log.open("w")
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("benchmark_worker.py")),
             json.dumps({"system": system, **group})],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log_file, text=True,
        )  # fmt: skip
        self._lines: queue.Queue[Optional[str]] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def send(self, **request: Any) -> None:
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the answer will say why

    def answer(self, seconds: float = ANSWER_SECONDS) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=seconds)
        except queue.Empty:
            self.error = f"no answer within {seconds:.0f} s"
            self.close()
            return {"error": self.error, "oom": False}
        if line is None:
            self.error = f"ended: {_last_line(self.log)}"
            return {"error": self.error, "oom": False}
        return json.loads(line)

    def ask(self, **request: Any) -> dict[str, Any]:
        self.send(**request)
        return self.answer()

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._log_file.close()


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1][:150] if lines else "no output"


def measure_all(
    cases: list[Case], logs: Optional[Path] = None, deadline: float = float("inf"), profiled: bool = False
) -> Iterator[list[Row]]:
    """A list of rows, one a system, for every case, as soon as it is done. deadline: time.monotonic() after which no
    case is begun; profiled: one more step of each, for the time of its kernels."""
    logs = logs or Path(tempfile.mkdtemp(prefix="benchmark-"))
    logs.mkdir(parents=True, exist_ok=True)
    groups = grouped(cases)
    teams = []
    for group in groups:
        wanted = {system: None for case in group for system in case["systems"]}
        teams.append({system: Process(system, group_of(group[0]), logs) for system in wanted})
    try:
        for process in (p for team in teams for p in team.values()):
            _note_failure(process, process.answer())
        for group, team in zip(groups, teams, strict=True):
            if time.monotonic() < deadline:
                _build(team)
            for case in group:
                late = time.monotonic() >= deadline
                systems = {s: team[s] for s in case["systems"]}
                yield _measure_case(case, systems, "not begun: no time left" if late else "", profiled)
            for process in team.values():
                process.close()
    finally:
        for process in (p for team in teams for p in team.values()):
            process.close()


def _note_failure(process: Process, reply: dict[str, Any]) -> None:
    if "error" in reply and process.error is None:
        process.error = reply["error"]


def _build(team: dict[str, Process]) -> None:
    alive = [process for process in team.values() if process.error is None]
    for process in alive:
        process.send(do="build")
    for process in alive:
        process.built = process.answer()
        _note_failure(process, process.built)


def _measure_case(case: Case, team: dict[str, Process], unbegun: str, profiled: bool) -> list[Row]:
    if unbegun:
        return [_shared(case, system) | {"error": unbegun} for system in team]
    turns, crowded = _take_turns(case, team, crowded=False), False
    if any(turn.get("oom") for found in turns.values() for turn in found) and len(team) > 1:
        turns, crowded = _take_turns(case, team, crowded=True), True
    rows = [_row(case, process, turns[system], crowded) for system, process in team.items()]
    _compare(rows)
    if profiled:
        _profile(case, team, rows, crowded)
    return rows


def _take_turns(case: Case, team: dict[str, Process], crowded: bool) -> dict[str, list[dict[str, Any]]]:
    """The answers of every system, round by round; a system that failed has no more turns, and where memory is short
    for several at once, nobody has."""
    turns: dict[str, list[dict[str, Any]]] = {system: [] for system in team}
    order = list(team)
    shown = _sent(case)
    first = case["warmup"]
    for process in team.values():
        if process.error is None:
            process.ask(do="release")
    for number, start in enumerate(range(0, case["steps"], case["round"])):
        count = min(case["round"], case["steps"] - start)
        turned = number % len(order)
        for system in order[turned:] + order[:turned]:
            process = team[system]
            if process.error is not None or any("error" in turn for turn in turns[system]):
                continue
            began = time.time()
            reply = process.ask(do="turn", case=shown, first=first + start, count=count, settle=case["settle"])
            turns[system].append(reply | {"began": began, "ended": time.time()})
            if reply.get("oom") and not crowded and len(team) > 1:
                return turns
            if crowded:
                process.ask(do="release")
    return turns


def _profile(case: Case, team: dict[str, Process], rows: list[Row], crowded: bool) -> None:
    """Into the rows of what did not fail; a step more than all that were timed."""
    for row in rows:
        if "error" not in row:
            process = team[row["system"]]
            row["profile"] = process.ask(do="profile", case=_sent(case), first=case["warmup"] + case["steps"])
            if crowded:
                process.ask(do="release")


def _sent(case: Case) -> dict[str, Any]:
    """What of a case a worker is told; the same every time, as a worker warms up for another."""
    return {key: value for key, value in case.items() if key != "systems"}


def _shared(case: Case, system: str) -> Row:
    return {"system": system, **_sent(case)}


def _row(case: Case, process: Process, turns: list[dict[str, Any]], crowded: bool) -> Row:
    row = _shared(case, process.system)
    error = process.error or next((turn["error"] for turn in turns if "error" in turn), None)
    if error is not None:
        return row | {"error": error, "log": str(process.log)}
    seconds = [second for turn in turns for second in turn["seconds"]]
    tokens = [count for turn in turns for count in turn["tokens"]]
    quartiles = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
    return row | {
        "tokens_per_s": rate(seconds, tokens),
        "ms_per_step": 1000 * statistics.median(seconds),
        "ms_quartiles": [1000 * quartiles[0], 1000 * quartiles[2]],
        "ms_range": [1000 * min(seconds), 1000 * max(seconds)],
        "round_tokens_per_s": [rate(turn["seconds"], turn["tokens"]) for turn in turns],
        "peak_gib": max(turn["peak_gib"] for turn in turns),
        "estimate_gib": turns[-1].get("estimate_gib"),
        "held_gib": process.built.get("held_gib"), "trainable": process.built["trainable"],
        "build_s": process.built["build_s"], "notes": process.built["notes"], "crowded": crowded,
        "loss": turns[-1]["loss"], "turns": [[turn["began"], turn["ended"]] for turn in turns],
        "seconds": seconds, "tokens": tokens,
    }  # fmt: skip


def rate(seconds: list[float], tokens: list[int]) -> float:
    """Tokens a second: of the median step where all have as many tokens, of all together otherwise."""
    if len(set(tokens)) == 1:
        return tokens[0] / statistics.median(seconds)
    return sum(tokens) / sum(seconds)


def _compare(rows: list[Row]) -> None:
    """How many times the peer's tokens/s ours has, of each round."""
    ours = next((row for row in rows if row["system"] == "ours" and "error" not in row), None)
    for row in rows:
        if ours is not None and row["system"] != "ours" and "error" not in row:
            pairs = zip(ours["round_tokens_per_s"], row["round_tokens_per_s"], strict=True)
            row["ours_over_this"] = [mine / theirs for mine, theirs in pairs]
