"""A run that is killed wherever it stands, over and over, ends with the same bits as one that was left alone."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from signal import SIGKILL
from typing import Any, Optional

import pytest
import torch
from conftest import alpaca_items
from kill_segment import run_segment
from ranks import process_context, torchrun_environments
from test_finetune import short_data, tiny_config, trainables

from accessory.config import Config, DataParallel
from accessory.resume import STATE_FILE, checkpoint_folders

# 66 items to train on, packed into 25 rows: 6 steps an epoch of 2 micro-batches of 2 rows (of all ranks), and a seventh
# of a single row. A validation after the third and the sixth.
RUN = {
    "quantization.method": "nf4",
    "recipe.name": "norm_bias_lora",
    "recipe.lora": True,
    "recipe.rank": 4,
    "recipe.dropout": 0.1,
    "data.packing": True,
    "data.max_words": 128,
    "data.val_fraction": 0.2,
    "train.accum_iter": 2,
    "train.val_interval": 0.5,
    "optim.lr": 1e-2,
    "save.step_interval": 2,
}
EPOCH = 13  # micro-batches
LONG, SHORT = 7, 3  # epochs
STUCK = 60  # seconds without a word

Word = tuple[str, int, tuple[int, ...]]  # what is being done, optimizer steps done, items of the micro-batch


@dataclass(frozen=True)
class Aim:
    """Kill `delay` seconds after rank 0 told `what` for the n-th time; None: it stands still there."""

    what: str
    n: int = 1
    delay: Optional[float] = None


@dataclass
class Segment:
    """A run from its start or continuation to its end or death: what each rank told."""

    told: list[list[Word]]
    killed: bool = False

    def count(self, what: str) -> int:
        """How often rank 0 told it."""
        return sum(word[0] == what for word in self.told[0])

    @property
    def place(self) -> str:
        """What rank 0 was doing when it died."""
        return self.told[0][-1][0] if self.told[0] else "start"

    @property
    def steps(self) -> list[int]:
        """The optimizer step of each micro-batch of rank 0."""
        return [step for what, step, _ in self.told[0] if what == "train"]

    @property
    def order(self) -> set[tuple]:
        """(rank, step, micro-batch of that step, its items) of all that was trained on."""
        order = set()
        for rank, words in enumerate(self.told):
            micro = Counter()
            for what, step, items in words:
                if what == "train":
                    order.add((rank, step, micro[step], items))
                    micro[step] += 1
        return order


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return short_data(tmp_path_factory.mktemp("data"), alpaca_items(82))


def kill_config(base: Path, data: Path, output_dir: Path, ranks: int, epochs: int) -> Config:
    return tiny_config(base, data, output_dir, **RUN, **{"train.batch_size": 2 // ranks, "train.epochs": epochs})


def run(config: Config, ranks: int, aim: Optional[Aim] = None, forgets: str = "", seed: float = 0) -> Segment:
    """Train until the run ends or is killed.

    forgets: what is not restored. seed: draws which rank dies first and for how long the other lives on.
    """
    context, segment = process_context(), Segment([[] for _ in range(ranks)])
    logs = [Path(config.output_dir).with_name(f"rank{rank}.log") for rank in range(ranks)]
    hold = (aim.what, aim.n) if aim is not None and aim.delay is None else None
    processes, ears = [], []
    for rank, environment in enumerate(torchrun_environments(ranks) if ranks > 1 else [{}]):
        ear, mouth = context.Pipe(duplex=False)
        arguments = (config, environment, logs[rank], mouth, hold if rank == 0 else None, forgets)
        processes.append(context.Process(target=run_segment, args=arguments))
        processes[-1].start()
        mouth.close()
        ears.append(ear)
    try:
        for rank, word in listen(ears):
            segment.told[rank].append(word)
            if aim is not None and not segment.killed and segment.count(aim.what) == aim.n:
                time.sleep(aim.delay or 0)
                segment.killed = kill(processes, random.Random(seed))
    finally:
        for process in processes:
            process.kill()
            process.join()
    if not segment.killed:
        assert {process.exitcode for process in processes} == {0}, "\n".join(log.read_text()[-3000:] for log in logs)
    return segment


def listen(ears: list[Connection]) -> Iterator[tuple[int, Word]]:
    """(rank, word), until all are silent for good."""
    open_ears = list(ears)
    while open_ears:
        ready = wait(open_ears, STUCK)
        assert ready, f"nothing heard for {STUCK} s"
        for ear in ready:
            try:
                yield ears.index(ear), ear.recv()
            except EOFError:
                open_ears.remove(ear)


def kill(processes: list[BaseProcess], draw: random.Random) -> bool:
    """One rank, then the other as torchrun does: asked to end, and soon made to. Whether any had to be."""
    first, *others = draw.sample(processes, len(processes))
    first.kill()
    for other in others:
        time.sleep(draw.uniform(0, 0.1))
        other.terminate()
        time.sleep(draw.uniform(0, 0.1))
        other.kill()
    for process in processes:
        process.join()
    return any(process.exitcode == -SIGKILL for process in processes)


def final_state(output_dir: Path) -> dict[str, Any]:
    """Trainables, moments and scheduler, by name."""
    state = torch.load(checkpoint_folders(output_dir / "checkpoints")[-1] / STATE_FILE, weights_only=False)
    parts = {"trainables": trainables(output_dir)} | {key: state[key] for key in ("optimizer_states", "lr_schedulers")}
    return dict(leaves(parts))


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, (dict, list, tuple)):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(part, f"{name}/{key}")
    else:
        yield name, value


def different(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names of what is not the same to the bit."""
    assert one.keys() == other.keys()
    return [n for n, v in one.items() if not (torch.equal(v, other[n]) if torch.is_tensor(v) else v == other[n])]


@pytest.fixture(scope="module")
def whole(request, tmp_path_factory, deep_folder, data) -> tuple[dict[str, Any], set[tuple]]:
    """Of a run of (ranks, epochs) that nobody kills: its final state, and the order of its samples."""
    ranks, epochs = request.param
    config = kill_config(deep_folder, data, tmp_path_factory.mktemp("whole") / "out", ranks, epochs)
    order = run(config, ranks).order
    state = final_state(Path(config.output_dir))
    kinds = ("trainables/", "/exp_avg", "/exp_avg_sq", "/last_epoch", "/_last_lr")
    assert all(any(kind in name for name in state) for kind in kinds)
    assert len(order) == ranks * epochs * EPOCH
    return state, order


def random_aims(draw: random.Random) -> list[Aim]:
    """20 in random order: 18 at what the run tells of, half of them while it goes on, and two by the clock."""
    aims = [Aim("train", draw.randint(1, 10)) for _ in range(6)]
    aims += [Aim("save", draw.randint(1, 20)) for _ in range(6)]
    aims += [Aim("validate", draw.randint(1, 6)) for _ in range(6)]
    aims[::2] = [replace(aim, delay=draw.uniform(0, 0.02)) for aim in aims[::2]]
    aims += [Aim("start", 1, draw.uniform(0, 0.8)) for _ in range(2)]
    return draw.sample(aims, len(aims))


@pytest.mark.parametrize(("whole", "ranks"), [((1, LONG), 1), ((2, LONG), 2)], indirect=["whole"], ids=["1", "2"])
def test_run_killed_twenty_times_ends_with_the_same_bits(whole, ranks, tmp_path, deep_folder, data):
    draw = random.Random(ranks)
    config = kill_config(deep_folder, data, tmp_path / "out", ranks, LONG)
    segments = []
    for aim in random_aims(draw):  # with two ranks, sdp and fsdp in turn: both compute the same
        config.strategy.data_parallel = DataParallel.fsdp if ranks > 1 and len(segments) % 2 else DataParallel.sdp
        segments.append(run(config, ranks, aim, seed=draw.random()))
    assert [segment.killed for segment in segments] == [True] * 20  # so many fit into the run
    places = Counter(segment.place for segment in segments)
    assert min(places["train"], places["save"], places["validate"]) >= 3, places
    assert most_steps_lost(segments) < RUN["save.step_interval"]

    segments.append(run(config, ranks, Aim("finish")))  # after the last step, before the result is written
    assert not (tmp_path / "out" / "trainable.safetensors").exists()
    segments.append(run(config, ranks))
    state, order = whole
    assert different(final_state(tmp_path / "out"), state) == []
    assert set().union(*(segment.order for segment in segments)) == order


def most_steps_lost(segments: list[Segment]) -> int:
    """By which a segment starts before the last one stopped."""
    furthest, lost = 0, []
    for steps in (segment.steps for segment in segments if segment.steps):
        lost.append(furthest - steps[0])
        furthest = steps[-1]
    return max(lost)


@pytest.mark.parametrize("whole", [(1, SHORT)], indirect=True, ids=[""])
@pytest.mark.parametrize(
    ("forgets", "same_state", "same_order"),
    [("", True, True), ("random state", False, True), ("sampler", False, False)],
)
def test_killed_after_an_epochs_last_step_and_again_in_the_next(
    forgets, same_state, same_order, whole, tmp_path, deep_folder, data
):
    """And what the comparison is worth: it fails where something is not restored."""
    config = kill_config(deep_folder, data, tmp_path / "out", 1, SHORT)
    aims = [Aim("train", 2 * EPOCH + 1), Aim("train", 6), None]
    segments = [run(config, 1, aim, forgets) for aim in aims]
    assert [segment.steps[0] for segment in segments] == [0, 14, 16]
    state, order = whole
    assert (different(final_state(tmp_path / "out"), state) == []) == same_state
    assert (set().union(*(segment.order for segment in segments)) == order) == same_order
