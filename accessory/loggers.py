"""Where a run writes its figures: a CSV always, wandb or TensorBoard besides."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from pytorch_lightning.loggers import CSVLogger, Logger

from accessory.config import LoggerConfig, LoggerName
from accessory.errors import UserError


def require_logger(config: LoggerConfig) -> None:
    """Before work: the package of the logger that was asked for."""
    packages = ("tensorboard", "tensorboardX")  # Lightning takes either
    if config.name is LoggerName.tensorboard and not any(map(find_spec, packages)):
        raise UserError("logger=tensorboard: needs tensorboard: pip install 'accessory[tensorboard]'")


def make_loggers(config: LoggerConfig, output_dir: Path) -> list[Logger]:
    loggers: list[Logger] = [CSVLogger(output_dir, name="logs", flush_logs_every_n_steps=10)]
    if config.name is LoggerName.wandb:
        loggers.append(_wandb(config, output_dir))
    elif config.name is LoggerName.tensorboard:
        from pytorch_lightning.loggers import TensorBoardLogger

        loggers.append(TensorBoardLogger(output_dir, name="tensorboard"))
    return loggers


def _wandb(config: LoggerConfig, output_dir: Path) -> Logger:
    from pytorch_lightning.loggers import WandbLogger

    try:
        logger = WandbLogger(project=config.project, name=output_dir.name, save_dir=output_dir, offline=config.offline)
        logger.experiment  # noqa: B018  connects: a missing login shows before training
    except Exception as error:  # wandb's errors share no base that it exports
        reason = str(error).splitlines()[0]
        raise UserError(
            f"logger=wandb: {reason}; run `wandb login`, or log without network: logger.offline=true"
        ) from None
    return logger
