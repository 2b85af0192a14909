"""The training step: a micro-batch in, its share of the global batch's mean loss out."""

from __future__ import annotations

import logging
import math
from typing import Any, Optional

import torch
from pytorch_lightning import LightningModule
from torch import Tensor

from accessory.config import OptimConfig
from accessory.errors import UserError
from accessory.figures import StepFigures, StepLog
from accessory.fused.graph import GraphedLoss
from accessory.models.llama import Llama, Segments
from accessory.models.loss import summed_cross_entropy
from accessory.optim import make_optimizer, make_scheduler
from accessory.quantization import linear_weight
from accessory.strategies import Vote, gather
from accessory.tuning.recipe import canonical_name, trainable_state

log = logging.getLogger(__name__)
GRAPH_INPUTS = ("input_ids", "position_ids", "targets", "bounds", "longest", "images")


def batch_loss(model: Llama, batch: dict[str, Any], fixed_shape: bool = False) -> Tensor:
    """Summed cross-entropy of a micro-batch's answer tokens, fp32 []. fixed_shape: nothing depends on the data, as a
    CUDA graph needs it."""
    bounds = batch.get("bounds")
    mask = None if bounds is None else Segments(bounds, batch.get("longest", batch["input_ids"].shape[1]))
    hidden = model.hidden_states(batch["input_ids"], batch["position_ids"], mask, batch.get("images"))
    return summed_cross_entropy(hidden, linear_weight(model.lm_head, hidden.dtype), batch["targets"], fixed_shape)


class FinetuneModule(LightningModule):
    """Trains what `model` marks as trainable; its checkpoint state is the trainables alone."""

    def __init__(self, model: Llama, config: OptimConfig, steps_per_epoch: int, epochs: float):
        super().__init__()
        self.model, self.config = model, config
        self.steps_per_epoch, self.epochs = steps_per_epoch, epochs
        self._micro: list[tuple[Tensor, list[int]]] = []  # (loss, items) of the step being accumulated
        self._validation = torch.zeros(2, dtype=torch.float64)
        self.validated_at = -1  # optimizer step of the last validation
        self.stop_wanted = False  # this rank was told to stop
        self.stop_agreed = False  # some rank was, and now all know it: after the same optimizer step
        self.graphed: Optional[GraphedLoss] = None  # forward and backward as one CUDA graph
        self.log_of_steps = StepLog()
        self._pending: Optional[StepFigures] = None  # of the newest step, until `settle`
        self._vote: Optional[Vote] = None  # on whether to stop, of ranks with graphs
        self._unreadable: set[str] = set()  # images that could not be read any more; at the end those of all ranks

    def train(self, mode: bool = True) -> "FinetuneModule":
        """Frozen parts stay in eval mode; only LoRA's dropout knows training."""
        super().train(mode)
        for name, module in self.named_modules():
            if module is not self and "lora_dropout" not in name:
                module.training = False
        return self

    def cpu(self) -> "FinetuneModule":
        """Nothing: Lightning calls it at the end of each fit, also of one that fails or is stopped. The frozen base of
        every rank would move into host memory, and with fsdp away from the buffers that it is gathered in."""
        return self

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Mean over all answer tokens of the global batch: Lightning divides by accum_iter and DDP by the number of
        ranks, so the share of this micro-batch is multiplied by both."""
        self._note_unreadable(batch)
        if self.graphed is not None:
            share = self._graphed_share(batch)
        else:
            share = batch_loss(self.model, batch) / batch["answer_tokens"]
        self._micro.append((share.detach(), batch["items"]))
        return share * (self.trainer.accumulate_grad_batches * self.trainer.world_size)

    def use_graphs(self) -> None:
        """Let a CUDA graph compute loss and gradients from now on: autograd, and with it Lightning's backward, then
        have nothing to do."""

        def share(batch: dict[str, Any]) -> Tensor:
            return batch_loss(self.model, batch, fixed_shape=True) * batch["scale"]

        self.graphed = GraphedLoss(share, [p for p in self.model.parameters() if p.requires_grad])

    def _graphed_share(self, batch: dict[str, Any]) -> Tensor:
        if not self._micro:  # the first of an optimizer step
            self.graphed.zero()
        if self.trainer.world_size > 1:
            self._vote = self._vote or Vote(self.device)
            self._vote.ask(self.stop_wanted)
        scale = torch.tensor(1 / batch["answer_tokens"])  # on the CPU: the graph's input takes it without waiting
        return self.graphed({name: batch[name] for name in GRAPH_INPUTS if name in batch} | {"scale": scale})

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        if self.graphed is None:
            super().backward(loss, *args, **kwargs)
        else:
            self.graphed.attach()  # gradients are there already

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        """Called between loss and backward, when a graph has its gradients already."""
        if self.graphed is None:
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)

    def _note_unreadable(self, batch: dict[str, Any]) -> None:
        for image in sorted(set(batch.get("unreadable", ())) - self._unreadable):
            self._unreadable.add(image)
            log.warning("%s; it could be read when the data was checked. Its items are skipped", image)

    @property
    def reads_late(self) -> bool:
        """Whether a step's figures are looked at one step later, when the next is already on its way to the GPU."""
        return self.graphed is not None

    def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any = None, **_: Any) -> None:
        """Clip; and stop before the update where loss or gradient is not finite. What is looked at later must not be
        updated by then: the optimizer's kernel leaves all as it is where `found_inf` is 1."""
        if self.graphed is not None and self.trainer.world_size > 1:
            self.graphed.sum_over_ranks()
        limit = self.config.clip_grad if self.config.clip_grad > 0 else math.inf
        trainables = [p for group in optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(trainables, limit)
        loss = torch.stack([loss for loss, _ in self._micro]).sum()
        loss = self._sum_and_agree(loss[None])[0]  # first: so that all ranks stop, or none
        self.settle()
        step = StepFigures(self.global_step, self.current_epoch, self._micro)
        step.send(loss, norm)
        if self.reads_late:
            optimizer.found_inf = (~torch.isfinite(loss + norm)).float()
        else:
            self._check(step)
        self._pending, self._micro = step, []

    def settle(self) -> None:
        """Wait for the newest step, and log it; where it was not finite, stop here. Comes before all that takes the
        step for done: the next update, a validation, a checkpoint, the end."""
        step, self._pending = self._pending, None
        if step is None:
            return
        if self.reads_late:
            self._check(step)
        self.log_of_steps.write(self.trainer.loggers, step, self.trainer.log_every_n_steps)

    def note(self, tokens: int, **figures: float) -> None:
        """What the host knows of the newest step. tokens: of all ranks."""
        self._pending.tokens, self._pending.host = tokens, figures
        if not self.reads_late:
            self.settle()

    def _check(self, step: StepFigures) -> None:
        loss, norm = step.read()
        if not math.isfinite(loss + norm) and not self._is_overflow(loss):
            self._stop_non_finite(step, norm)

    def _sum_and_agree(self, values: Tensor) -> Tensor:
        """As `_reduce`; with graphs it waits for no more than the beginning of the last micro-batch."""
        if self._vote is None:
            return self._reduce(values)
        torch.distributed.all_reduce(values)
        self.stop_agreed = self._vote.answer()
        return values

    def _reduce(self, values: Tensor) -> Tensor:
        """[n] -> [n], the sum over ranks; on the way they agree whether to stop. So every rank has to come here equally
        often: once an optimizer step, once a validation, with fsdp once a batch of it."""
        if self.trainer.world_size == 1:
            self.stop_agreed = self.stop_wanted
            return values
        total = torch.cat([values, values.new_full((1,), float(self.stop_wanted))])
        torch.distributed.all_reduce(total)  # Lightning's has the host wait at a barrier first
        self.stop_agreed = total[-1].item() > 0
        return total[:-1]

    def _is_overflow(self, loss: float) -> bool:
        """With loss scaling an overflowing gradient is routine: the scaler skips that step and lowers its scale. Below
        a scale of 1 it was no overflow."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        return scaler is not None and math.isfinite(loss) and scaler.get_scale() > 1

    def _stop_non_finite(self, step: StepFigures, norm: float) -> None:
        ranks = gather([(bool(torch.isfinite(loss)), items) for loss, items in step.micro])
        micro = [part for parts in ranks for part in parts]
        bad = [items for finite, items in micro if not finite]
        items = sorted({i for part in (bad or [items for _, items in micro]) for i in part})
        what = "loss" if bad else f"gradient (norm {norm})"
        raise UserError(
            f"step {step.number + 1}: the {what} is not finite; stopped before the update. Items of that step "
            f"(numbers within the training split): {items}. Lower --lr, or look at these items"
        )

    def on_validation_epoch_start(self) -> None:
        self._validation = torch.zeros(2, dtype=torch.float64)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._note_unreadable(batch)
        tokens = (batch["targets"] != -100).sum().item()
        self._validation += torch.tensor([batch_loss(self.model, batch).item(), tokens], dtype=torch.float64)

    def on_validation_epoch_end(self) -> None:
        """Token-weighted mean over the whole split."""
        nll, tokens = self.end_validation()
        if self.stop_agreed:
            return
        loss = (nll / tokens).float()  # NaN where every image that answers belong to has vanished
        self.log_dict({"val_loss": loss, "val_ppl": loss.exp()})
        self.log_of_steps.newest["val_loss"] = loss.item()
        self.validated_at = self.trainer.global_step

    def end_validation(self) -> Tensor:
        """float64 [2]: loss and answer tokens of all ranks. A rank that was told to stop comes here early, instead of
        later; the others then learn it here."""
        return self._reduce(self._validation.to(self.device))

    def agree_on_stop(self) -> bool:
        """Whether any rank was told to stop; asked by all of them at the same place."""
        self._reduce(self._validation.new_empty(0, device=self.device))
        return self.stop_agreed

    def share_unreadable(self) -> None:
        """Let every rank know the images that any could not read."""
        self._unreadable = set().union(*gather(self._unreadable))

    on_train_end = share_unreadable

    @property
    def unreadable_images(self) -> list[str]:
        """Images that vanished or broke while training ran, and were skipped as configured."""
        return sorted(self._unreadable)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["unreadable_images"] = self.unreadable_images

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._unreadable = set(checkpoint.get("unreadable_images", ()))
        for state in checkpoint["optimizer_states"]:  # which bring their run's way of updating with them
            for group in state["param_groups"]:
                group["fused"] = self.reads_late or None

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = make_optimizer(self.model, self.config, fused=self.reads_late)
        scheduler = make_scheduler(optimizer, self.config, self.steps_per_epoch, self.epochs)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def state_dict(self, *_: Any, **__: Any) -> dict[str, Tensor]:
        return trainable_state(self.model)

    def load_state_dict(self, state: dict[str, Tensor], strict: bool = True, assign: bool = False) -> Optional[Any]:
        trainables = {canonical_name(n): p for n, p in self.model.named_parameters() if p.requires_grad}
        if trainables.keys() != state.keys():
            odd = sorted(trainables.keys() ^ state.keys())[0]
            raise UserError(f"checkpoint and recipe disagree on what trains: {odd} is in only one of them")
        with torch.no_grad():
            for name, parameter in trainables.items():
                parameter.copy_(state[name])
        return None
