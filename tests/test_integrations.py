"""Lightning, Hugging Face's Trainer, Accelerate and loggers: evaluation with the averaged weights, and checkpoints to go on from."""

import copy
import importlib.util

import pytest
import torch
from small import backward, differences, net, train
from torch import nn
from torch.utils.data import DataLoader, Dataset

import hyperopt
from hyperopt import SGD, Adam, Hyper, ScheduleFree, batch_statistics
from hyperopt.integrations import LearnedLR, scalars, unwrapped
from hyperopt.integrations.averages import Averages, copied, towers

pytestmark = pytest.mark.filterwarnings("ignore")  # of the frameworks' own
TOWER = Hyper(ScheduleFree(Adam), lr=0.01).stack(Adam)


def needs(*packages):
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} not installed: the extra integrations")


class Wrapper:
    def __init__(self, optimizer):
        self.optimizer = optimizer


class Rows(Dataset):
    """Sixty rows whose targets are in them; the same ones in the same order."""

    def __init__(self, n=60):
        self.x = torch.randn(n, 4, generator=torch.Generator().manual_seed(1))

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return {"x": self.x[i], "labels": self.x[i, :3].sin()}


class Net(nn.Module):
    """A model that computes its own loss, as those of Hugging Face do."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x, labels=None):
        out = self.body(x)
        return {"loss": (out - labels).square().mean(), "logits": out} if labels is not None else {"logits": out}


def loss_on(model, rows=None):
    batch = next(iter(DataLoader(rows or Rows(), batch_size=60)))
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        return float(model(**batch)["loss"])


# ---- what all of them share


def test_the_tower_is_found_in_wrappers_and_nothing_else_is():
    optimizer = TOWER.bind(net().parameters())
    assert unwrapped(optimizer) is optimizer
    assert unwrapped(Wrapper(Wrapper(optimizer))) is optimizer
    plain = torch.optim.SGD(net().parameters(), lr=0.1)
    with pytest.raises(TypeError, match="a tower that is bound, or a wrapper around one, is needed, got SGD"):
        unwrapped(plain)
    assert towers([plain, Wrapper(optimizer)]) == [optimizer]


@pytest.mark.parametrize("per", ["group", "tensor"])
def test_scalars_are_the_values_and_means_of_them(per):
    model = net()
    optimizer = Hyper(SGD, lr=0.1, per=per).stack(Adam).bind(model.parameters())
    train(model, optimizer, range(3))
    found = scalars(optimizer, hypergradients=True)
    assert found["hyper/0.lr"] == pytest.approx(float(optimizer.hyperparameters()["0.lr"].mean()))
    assert found["hypergradient/0.lr"] == pytest.approx(float(optimizer.hypergradients()["0.lr"].mean()))
    assert "hypergradient/0.lr" not in scalars(Wrapper(optimizer))
    assert all(type(value) is float for value in found.values())


def test_a_learned_lr_is_left_alone_by_its_scheduler_and_not_by_a_constant_one():
    ends = []
    for make in (None, LearnedLR, lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)):
        model = net()
        optimizer = TOWER.bind(model.parameters())
        scheduler = make(optimizer) if make else None
        for step in range(5):
            backward(model, step)
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
        ends.append(copied(model))
        if make is LearnedLR:
            assert scheduler.get_last_lr() == [optimizer.param_groups[0]["lr"]]
            assert scheduler.state_dict() == {"last_epoch": 5}
    assert differences(ends[0], ends[1]) == []
    assert differences(ends[0], ends[2])


def test_averages_are_shown_for_a_while_or_for_good():
    model = Net()
    optimizer = TOWER.bind(model.parameters())
    loader = DataLoader(Rows(), batch_size=20)
    for batch in loader:
        optimizer.zero_grad()
        model(**batch)["loss"].backward()
        optimizer.step()
    training = copied(model)
    with optimizer.averaged(), batch_statistics(model, loader):
        expected = copied(model)
    averages = Averages(loader)
    for _ in range(2):  # twice is once
        averages.enter([Wrapper(optimizer)], model)
        assert differences(copied(model), expected) == []
    assert averages.leave()
    assert not averages.leave()
    assert differences(copied(model), training) == []
    for _ in range(2):
        averages.settle([optimizer], model)
        assert differences(copied(model), expected) == []
        assert differences(averages.training, training) == []
    with averages.showing([optimizer], model):
        assert differences(copied(model), expected) == []
    averages.resume(model)
    assert differences(copied(model), training) == []
    assert averages.training is None


# ---- Lightning


def lightning_run(folder, epochs, resume=None, fail_at=None, seen=None):
    import lightning.pytorch as pl

    from hyperopt.integrations.lightning import AveragedWeights

    seen = {} if seen is None else seen

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Net()

        def forward(self, x, labels=None):
            return self.net(x, labels)

        def training_step(self, batch, index):
            return self(**batch)["loss"]

        def on_train_batch_end(self, *_):
            seen["module"], seen["trained"] = self, copied(self)

        def validation_step(self, batch, index):
            seen.setdefault("validation", []).append(copied(self))
            self.log("loss", self(**batch)["loss"])
            if "trained" in seen and self.current_epoch == fail_at:
                raise KeyError("broken")

        def on_train_epoch_end(self):
            seen.setdefault("training", []).append(copied(self))

        def test_step(self, batch, index):
            seen["test"] = copied(self)

        def configure_optimizers(self):
            seen["optimizer"] = TOWER.bind(self.parameters())
            return seen["optimizer"]

    loader = DataLoader(Rows(), batch_size=20)
    save = pl.callbacks.ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, monitor=None)
    options = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
        "num_sanity_val_steps": 1,
    }
    trainer = pl.Trainer(max_epochs=epochs, callbacks=[save, AveragedWeights(loader)], default_root_dir=folder, **options)
    module = Module()
    trainer.fit(module, loader, DataLoader(Rows(), batch_size=60), ckpt_path=resume)
    return trainer, module, seen, loader


@needs("lightning")
def test_lightning_validates_tests_and_ends_with_the_averaged_weights(tmp_path):
    trainer, module, seen, loader = lightning_run(tmp_path, 2)
    shown, trained = seen["validation"][-1], seen["training"][-1]
    assert differences(shown, trained)
    module.load_state_dict(trained)
    with seen["optimizer"].averaged(), batch_statistics(module, loader):
        expected = copied(module)
    module.load_state_dict(shown)
    assert differences(shown, expected) == []
    trainer.test(module, DataLoader(Rows(), batch_size=60), verbose=False)
    assert differences(seen["test"], expected) == []


@needs("lightning")
def test_lightnings_checkpoints_hold_the_average_and_training_goes_on_bit_for_bit(tmp_path):
    *_, seen, _ = lightning_run(tmp_path / "a", 3)
    lightning_run(tmp_path / "b", 2)
    saved = torch.load(tmp_path / "b" / "epoch=1.ckpt", weights_only=True)
    assert differences(saved["state_dict"], seen["validation"][2]) == []  # the first is the sanity check
    assert differences(saved["training_state_dict"], seen["training"][1]) == []
    trainer, module, again, _ = lightning_run(tmp_path / "c", 3, resume=tmp_path / "b" / "epoch=1.ckpt")
    assert differences(again["training"][-1], seen["training"][-1]) == []
    assert differences(again["validation"][-1], seen["validation"][-1]) == []
    trainer.save_checkpoint(tmp_path / "end.ckpt")  # once the model has the averaged weights
    end = torch.load(tmp_path / "end.ckpt", weights_only=True)
    assert differences(end["training_state_dict"], seen["training"][-1]) == []
    assert differences(end["state_dict"], copied(module)) == []


@needs("lightning")
@pytest.mark.parametrize(("every", "accumulate", "steps"), [(2, 1, [2, 4, 6]), (1, 3, [1, 2]), (None, 1, [3, 6])])
def test_lightning_logs_what_is_learned(tmp_path, every, accumulate, steps):
    import lightning.pytorch as pl
    from lightning.pytorch.loggers import CSVLogger

    from hyperopt.integrations.lightning import LogLearned

    class Logger(CSVLogger):
        logged = ()

        def log_metrics(self, metrics, step=None):
            Logger.logged += ((step, metrics),)

    _, module, _, loader = lightning_run(tmp_path, 1)
    options = {"accelerator": "cpu", "enable_progress_bar": False, "enable_checkpointing": False, "log_every_n_steps": 3}
    options |= {"logger": Logger(tmp_path), "callbacks": [LogLearned(every)], "accumulate_grad_batches": accumulate}
    pl.Trainer(max_epochs=2, **options).fit(module, loader)
    logged = [(step, metrics) for step, metrics in Logger.logged if "hyper/0.lr" in metrics]
    assert [step for step, _ in logged] == steps
    assert logged[-1][1]["hyper/0.lr"] != pytest.approx(0.01, rel=1e-6)


@needs("lightning")
def test_the_training_weights_come_back_after_an_error_in_lightning(tmp_path):
    seen = {}
    with pytest.raises(KeyError, match="broken"):
        lightning_run(tmp_path, 2, fail_at=1, seen=seen)
    assert differences(seen["validation"][-1], seen["trained"])
    assert differences(copied(seen["module"]), seen["trained"]) == []


# ---- Hugging Face


def trainer_for(folder, model=None, callbacks=None, scheduler=LearnedLR, rows=None, datasets=None, schedule=False, **options):
    from transformers import Trainer, TrainingArguments

    from hyperopt.integrations.transformers import AveragedWeights

    model = model or Net()
    optimizer = TOWER.bind(model.parameters(), schedule=schedule)
    seen = []

    class Seeing(Trainer):
        def prediction_step(self, model, *args, **kwargs):
            seen.append(copied(model))
            return super().prediction_step(model, *args, **kwargs)

    given = {
        "max_steps": 6,
        "eval_strategy": "steps",
        "save_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 2,
        "logging_steps": 1,
    } | options
    arguments = TrainingArguments(
        str(folder), report_to="none", use_cpu=True, per_device_train_batch_size=20, per_device_eval_batch_size=60, disable_tqdm=True,
        label_names=["labels"], seed=3, **given,
    )  # fmt: skip
    pair = (optimizer, scheduler(optimizer) if scheduler else None)
    callbacks = [AveragedWeights(batches=DataLoader(Rows(), batch_size=20))] if callbacks is None else callbacks
    trainer = Seeing(
        model, arguments, train_dataset=rows or Rows(), eval_dataset=datasets or rows or Rows(), optimizers=pair, callbacks=callbacks
    )
    return trainer, model, optimizer, seen


@needs("transformers", "accelerate")
def test_the_trainer_evaluates_and_ends_with_the_averaged_weights(tmp_path):
    trainer, model, optimizer, seen = trainer_for(tmp_path)
    trainer.train()
    assert float(optimizer.hyperparameters()["0.lr"]) != pytest.approx(0.01, rel=1e-6)
    for i, step in enumerate((2, 4, 6)):
        saved = torch.load(tmp_path / f"checkpoint-{step}" / "averaged" / "pytorch_model.bin")
        assert differences(saved, seen[i]) == []
    assert differences(copied(model), seen[-1]) == []
    logged = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(logged[-1])
    assert differences(trainer.state.log_history[0]["learning_rate"], 0.0)


@needs("transformers", "accelerate")
def test_the_trainer_goes_on_bit_for_bit_from_a_checkpoint_and_from_its_end(tmp_path):
    whole, model, _, seen = trainer_for(tmp_path / "a")
    whole.train()
    again, other, _, later = trainer_for(tmp_path / "b")
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    assert differences(copied(model), copied(other)) == []
    assert differences(seen[-1], later[-1]) == []


@needs("transformers", "accelerate")
def test_a_second_run_of_the_same_trainer_goes_on_from_the_training_weights(tmp_path):
    from transformers import TrainerCallback

    from hyperopt.integrations.transformers import AveragedWeights

    starts = []

    class Starts(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            starts.append(copied(kwargs["model"]))

    averaging = AveragedWeights()
    trainer, model, *_ = trainer_for(tmp_path, callbacks=[averaging, Starts()], max_steps=4)
    trainer.train()
    training = averaging._averages.training
    assert differences(copied(model), training)
    trainer.train()
    assert differences(starts[1], training) == []


@needs("transformers", "accelerate")
def test_the_best_model_is_that_of_the_averaged_weights(tmp_path):
    trainer, model, *_ = trainer_for(tmp_path, load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True)
    trainer.train()  # greater is better: the first checkpoint
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    assert differences(copied(model), torch.load(tmp_path / "checkpoint-2" / "averaged" / "pytorch_model.bin")) == []


@needs("transformers", "accelerate")
def test_a_pretrained_model_is_saved_so_that_it_can_be_loaded(tmp_path):
    from transformers import BertConfig, BertForSequenceClassification

    from hyperopt.integrations.transformers import AveragedWeights

    class Tokens(Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, i):
            return {"input_ids": torch.arange(6) + i, "labels": i % 2}

    torch.manual_seed(0)
    config = BertConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    plain, callbacks = BertForSequenceClassification(config), [AveragedWeights()]
    trainer, model, *_ = trainer_for(tmp_path, plain, callbacks, rows=Tokens(), max_steps=2, load_best_model_at_end=True)
    trainer.train()
    loaded = BertForSequenceClassification.from_pretrained(tmp_path / "checkpoint-2" / "averaged")
    assert differences(copied(model), copied(loaded)) == []


@needs("transformers", "accelerate")
def test_a_scheduler_that_would_stop_learning_is_named(tmp_path):
    trainer, *_ = trainer_for(tmp_path, scheduler=None, lr_scheduler_type="constant")
    with pytest.raises(ValueError, match=r"assigns lr before every step.*LearnedLR\(optimizer\)"):
        trainer.train()


@needs("transformers", "accelerate")
def test_the_trainers_own_schedule_scales_a_tower_that_is_bound_for_it(tmp_path):
    trainer, _, optimizer, _ = trainer_for(tmp_path, scheduler=None, schedule=True)  # the default schedule: linear, to 0
    trainer.train()
    assert float(optimizer.param_groups[0]["lr"]) == 0
    assert float(optimizer.hyperparameters()["0.lr"]) > 0


@needs("transformers", "accelerate")
def test_several_datasets_are_all_evaluated_with_the_average_or_named(tmp_path):
    from hyperopt.integrations.transformers import AveragedWeights

    datasets = {"a": Rows(), "b": Rows()}
    trainer, _, _, seen = trainer_for(tmp_path / "a", datasets=datasets, callbacks=[AveragedWeights(datasets=2)], max_steps=2)
    trainer.train()
    assert len(seen) == 2
    assert differences(*seen) == []
    trainer, *_ = trainer_for(tmp_path / "b", datasets=datasets, callbacks=[AveragedWeights()], max_steps=2)
    with pytest.raises(ValueError, match=r"more than one dataset was evaluated: AveragedWeights\(datasets=2\)"):
        trainer.train()


# ---- Accelerate


@needs("accelerate")
def test_accelerate_trains_saves_and_evaluates(tmp_path):
    from accelerate import Accelerator

    def run(accelerated, steps, folder=None, load=None):
        model = Net()
        optimizer = TOWER.bind(model.parameters())
        loader = DataLoader(Rows(), batch_size=20)
        backward = torch.Tensor.backward
        if accelerated:
            accelerator = Accelerator(cpu=True)
            model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
            backward = accelerator.backward
            if load:
                accelerator.load_state(load)
        batches = list(loader)
        for step in steps:
            optimizer.zero_grad()
            backward(model(**batches[step % 3])["loss"])
            optimizer.step()
        if folder:
            accelerator.save_state(folder)
        with unwrapped(optimizer).averaged():
            return copied(model), scalars(optimizer)

    expected = run(False, range(6))
    assert differences(run(True, range(6)), expected) == []
    run(True, range(4), folder=tmp_path)
    assert differences(run(True, range(4, 6), load=tmp_path), expected) == []


# ---- loggers


@needs("wandb")
def test_learned_values_reach_wandb(tmp_path, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_SILENT", "true")
    optimizer = hyperopt.auto(net())
    run = wandb.init(mode="offline", dir=str(tmp_path))
    run.log(scalars(optimizer), step=1, commit=True)
    assert run.summary["hyper/0.lr"] == pytest.approx(1e-3)
    run.finish()
