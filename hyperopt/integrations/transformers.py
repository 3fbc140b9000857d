"""Hugging Face's Trainer: evaluation and checkpoints with the averaged weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, TrainerCallback  # pyright: ignore[reportMissingImports]

from . import unwrapped
from .averages import Averages, copied

FOLDER, FILE = "averaged", "pytorch_model.bin"  # in a checkpoint


class AveragedWeights(TrainerCallback):  # pyright: ignore[reportGeneralTypeIssues]
    """Evaluation during training with the averaged weights of a tower, which are also saved, as `checkpoint-…/averaged`.

    The weights of a checkpoint itself are those that training goes on from. Once training is over, the model has the averaged weights, with
    `load_best_model_at_end` those of the best checkpoint, for `trainer.evaluate()`, `predict()` and `save_model()`.

    Args:
        datasets: the number of datasets that are evaluated, where `eval_dataset` is a dictionary of several. Default: 1.
        batches: training data, for models with BatchNorm: a loader that can be iterated over again and again, see `batch_statistics`.
        forward: how a batch is given to the model, if that is not what `batch_statistics` does by itself.

    Raises:
        ValueError: when training begins, a scheduler that assigns the lr that is to be learned; more evaluations than `datasets`.
    """

    def __init__(self, datasets: int = 1, batches: Iterable[Any] | None = None, forward: Callable[[Any], Any] | None = None) -> None:
        self.datasets, self._averages = datasets, Averages(batches, forward)
        self._evaluated, self._due = 0, False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        scheduler = getattr(kwargs["lr_scheduler"], "scheduler", kwargs["lr_scheduler"])
        optimizer = unwrapped(kwargs["optimizer"])
        if "lr" in optimizer.tower.learning and not optimizer.schedule and isinstance(scheduler, LambdaLR):
            raise ValueError(
                f"lr_scheduler_type={str(args.lr_scheduler_type)!r} assigns lr before every step, so that it is not learned: "
                "Trainer(…, optimizers=(optimizer, LearnedLR(optimizer))), or bind(…, schedule=True) to let it scale the learned lr"
            )
        self._averages.resume(None if state.global_step else kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._due = control.should_evaluate
        if self._due:
            self._evaluated = 0
            self._averages.enter([kwargs["optimizer"]], kwargs["model"])

    on_epoch_end = on_step_end

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._evaluated += 1
        if self._due and self._evaluated > self.datasets:
            raise ValueError(f"more than one dataset was evaluated: AveragedWeights(datasets={self._evaluated}), or how many there are")
        if self._evaluated == self.datasets:
            self._averages.leave()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._due = False

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder, model = Path(args.output_dir) / f"checkpoint-{state.global_step}", kwargs["model"]
        if not state.is_world_process_zero or not folder.is_dir():
            return
        with self._averages.showing([kwargs["optimizer"]], model):
            if isinstance(model, PreTrainedModel):
                model.save_pretrained(folder / FOLDER)
            else:
                (folder / FOLDER).mkdir(exist_ok=True)
                torch.save(copied(model), folder / FOLDER / FILE)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._due, model = False, kwargs["model"]
        best = Path(state.best_model_checkpoint or "") / FOLDER
        if not (args.load_best_model_at_end and state.best_model_checkpoint and best.is_dir()):
            self._averages.settle([kwargs["optimizer"]], model)
            return
        self._averages.leave()
        self._averages.training = copied(model)
        saved = type(model).from_pretrained(best).state_dict() if isinstance(model, PreTrainedModel) else torch.load(best / FILE)
        model.load_state_dict(saved)
