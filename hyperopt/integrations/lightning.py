"""Lightning: evaluation and checkpoints with the averaged weights, and learned values in its loggers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from lightning.pytorch.callbacks import Callback  # pyright: ignore[reportMissingImports]

from . import scalars
from .averages import Averages, copied, towers

TRAINING = "training_state_dict"  # entry of a checkpoint


class AveragedWeights(Callback):
    """Validation, tests, predictions and checkpoints with the averaged weights of a tower; training goes on with its own.

    A checkpoint holds the averaged weights as its `state_dict`, which `load_from_checkpoint` reads, and the training weights beside them,
    from which `fit(ckpt_path=…)` goes on. Once training is over, the model has the averaged weights. A checkpoint made with
    `save_weights_only=True` holds the weights of training alone, as Lightning does not show it to callbacks.

    Args:
        batches: training data, for models with BatchNorm: a loader that can be iterated over again and again, see `batch_statistics`.
        forward: how a batch is given to the model, if that is not what `batch_statistics` does by itself.
    """

    def __init__(self, batches: Iterable[Any] | None = None, forward: Callable[[Any], Any] | None = None) -> None:
        self._averages = Averages(batches, forward)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self._averages.resume(None)  # a new run begins with new optimizers

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self._averages.enter(trainer.optimizers, pl_module)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self._averages.leave()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._averages.leave()

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self._averages.settle(trainer.optimizers, pl_module)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        training = self._averages.training or copied(pl_module)
        with self._averages.showing(trainer.optimizers, pl_module):
            checkpoint["state_dict"] = copied(pl_module)
        checkpoint[TRAINING] = training

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if TRAINING in checkpoint:
            pl_module.load_state_dict(checkpoint[TRAINING])


class LogLearned(Callback):
    """Writes every hyperparameter of the towers to the trainer's loggers, as `hyper/<level>.<name>`.

    Args:
        every: number of steps from one entry to the next. Default: the trainer's `log_every_n_steps`.
        hypergradients: write them too. Default: False.
    """

    def __init__(self, every: int | None = None, hypergradients: bool = False) -> None:
        self.every, self.hypergradients, self._last = every, hypergradients, 0

    def on_train_batch_end(self, trainer: Any, *_: Any, **__: Any) -> None:
        step = trainer.global_step
        if step == self._last or step % (self.every or trainer.log_every_n_steps):
            return
        self._last = step
        found = towers(trainer.optimizers)
        for i, tower in enumerate(found):
            prefix = f"optimizer{i}/" if len(found) > 1 else ""
            values = {prefix + name: value for name, value in scalars(tower, self.hypergradients).items()}
            for logger in trainer.loggers:
                logger.log_metrics(values, step=step)
