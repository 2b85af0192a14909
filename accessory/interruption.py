"""SIGTERM and Ctrl-C while a run trains: what it has done is saved, and it ends in order.

A signal is only noted where it arrives. The ranks agree to stop at the sums over ranks that they take anyway, at each
optimizer step and at the end of each validation (FinetuneModule._reduce), so all stop after the same step.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any, NoReturn, Optional

from pytorch_lightning import Callback, Trainer

from accessory.errors import Interrupted
from accessory.module import FinetuneModule
from accessory.resume import Checkpoints

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # the last when a connection breaks


class Interruption(Callback):
    """As a context around Trainer.fit it takes the signals, and acts on them once training has begun.

    checkpoints: where to save. named: whether the command names a checkpoint to continue from.
    """

    def __init__(self, checkpoints: Checkpoints, named: bool):
        self.checkpoints, self.named = checkpoints, named
        self._module: Optional[FinetuneModule] = None
        self._signal = signal.SIGTERM  # of a rank that hears of it from the others
        self._before: dict[int, Any] = {}
        # torchrun passes on a Ctrl-C that the terminal may have sent to its ranks too.
        self._is_alone = "TORCHELASTIC_RUN_ID" not in os.environ

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            handlers = {number: signal.getsignal(number) for number in SIGNALS}
            self._before = {number: old for number, old in handlers.items() if old is not signal.SIG_IGN}
        self._take()
        if not self._is_alone:
            threading.Thread(target=_end_with_torchrun, args=(os.getppid(),), daemon=True).start()
        return self

    def __exit__(self, kind: Optional[type[BaseException]], *_: Any) -> None:
        for number, old in self._before.items():
            signal.signal(number, old)
        if kind is None and self._module is not None and self._module.stop_wanted:  # since the last validation
            self._raise(self._module.global_step)

    def _take(self) -> None:
        for number in self._before:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: Optional[FrameType]) -> None:
        is_interrupt = number == signal.SIGINT
        if self._module is None:
            self._end_early(number)
        elif not self._module.stop_wanted:
            self._signal, self._module.stop_wanted = signal.Signals(number), True
            if is_interrupt and self._is_alone and sys.stderr.isatty():
                os.write(2, b"\nCtrl-C: stopping after this step; once more stops at once, without saving it\n")
        elif is_interrupt and self._is_alone:
            signal.signal(number, signal.SIG_DFL)
            raise Interrupted(number, f"stopped at once by a second Ctrl-C; {self._go_on}{self._from_newest()}")

    def _end_early(self, number: int) -> None:
        """Nothing has been done yet that could be lost."""
        if number == signal.SIGINT:  # Lightning would make exit code 1 of a KeyboardInterrupt
            raise Interrupted(number, f"stopped before the first step; {self._go_on}{self._from_newest()}")
        signal.signal(number, self._before[number])
        os.kill(os.getpid(), number)

    @property
    def _go_on(self) -> str:
        """A named checkpoint stays the one that is taken; but it is needed until the run has one of its own."""
        newest, folder = self.checkpoints.newest, self.checkpoints.folder
        has_own = newest is not None and newest.absolute().parent == folder.absolute()
        return f"the same command{' without --resume' if self.named and has_own else ''} continues"

    def _from_newest(self) -> str:
        newest = self.checkpoints.newest
        return f" from {newest}" if newest is not None else ", from its start"

    def on_train_start(self, trainer: Trainer, module: FinetuneModule) -> None:
        """Lightning has put a handler in front that lets ranks talk to each other at any moment: they might wait for
        ever. At its end it puts back what it found."""
        self._module = module
        self._take()

    def on_train_batch_start(self, trainer: Trainer, module: FinetuneModule, *_: Any) -> None:
        """Not at the end of the step, which has yet to be logged."""
        if module.stop_agreed:
            self._stop(trainer)

    on_train_epoch_end = on_validation_end = on_train_batch_start

    def on_validation_start(self, trainer: Trainer, module: FinetuneModule) -> None:
        self.on_train_start(trainer, module)  # the last validation is one of its own to Lightning
        self.on_train_batch_start(trainer, module)

    def on_validation_batch_start(self, trainer: Trainer, module: FinetuneModule, *_: Any) -> None:
        if module.model.sharded is not None:  # a rank that left early would be missed where the next block is gathered
            if module.agree_on_stop():
                self._stop(trainer)
        elif module.stop_wanted:
            module.end_validation()
            self._stop(trainer)

    def _stop(self, trainer: Trainer) -> NoReturn:
        self.checkpoints.save(trainer)
        self._raise(trainer.global_step)

    def _raise(self, step: int) -> NoReturn:
        newest = self.checkpoints.newest
        raise Interrupted(
            self._signal, f"stopped by {self._signal.name} after step {step}; saved {newest}; {self._go_on}"
        )


def _end_with_torchrun(parent: int) -> None:
    """torchrun may be killed and leave its ranks behind; they save and end, as nobody would look after them."""
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)
