"""Train the paper's MLP with a tower, then with its initial and with its learned hyperparameters held constant.

    python -m experiments.mnist --tower "Adam / SGD" --dataset mnist --epochs 3 --seed 0

Protocol: 784-128-10, tanh, cross entropy, inputs in [0, 1], batch 256; the three runs have the same initial weights and the same batches.
"""

from __future__ import annotations

import contextlib
import platform
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch.nn.functional import cross_entropy
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from experiments import cli, data, models, store
from hyperopt import Hyper, Recorder


def _device(name: str) -> str:
    return cli.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def main(
    tower: Annotated[str, typer.Option(help="the optimizer of the weights and those above it, lowest first")] = "Adam / SGD",
    dataset: Annotated[str, typer.Option(help=f"one of {', '.join(data.NAMES)}")] = "mnist",
    epochs: Annotated[int, typer.Option(min=1)] = 3,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="seed of the initial weights and of the batches")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="images per step")] = 256,
    hidden: Annotated[int, typer.Option(min=1, help="width of the hidden layer")] = 128,
    validation: Annotated[bool, typer.Option(help="measure on held-out training images instead of the test images")] = False,
    device: Annotated[str, typer.Option(callback=_device, help="auto (cuda if there is one), cpu, cuda, …")] = "auto",
    out: Annotated[Path, typer.Option(callback=cli.folder, help="folder for TensorBoard log, CSV, PNG and result.json")] = Path(
        "runs/mnist"
    ),
) -> None:
    """Train an MLP with a tower, and compare it with its rule held at the initial and at the learned values."""
    try:
        spec = Hyper.parse(tower)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--tower") from error
    try:
        images = data.load(dataset, device, validation=validation)
    except (ValueError, data.DataNotFoundError) as error:
        raise typer.BadParameter(str(error), param_hint="--dataset") from error
    out.mkdir(parents=True, exist_ok=True)
    measured = "validation" if validation else "test"
    steps = -(-len(images.train_x) // batch) * epochs

    runs = []

    def train(name: str, spec: Hyper) -> Recorder:
        """Train one run, and append its results to `runs`, also where it is interrupted after its first step."""
        torch.manual_seed(seed)
        model = models.mlp(images.train_x.shape[1], hidden).to(device)
        shuffle = torch.Generator().manual_seed(seed)
        optimizer = spec.bind(model.parameters())
        errors, seconds, stopped = [], 0.0, False
        # purge_step: a second run into the same folder replaces the curves of the first.
        with (
            Recorder(optimizer) as recorder,
            SummaryWriter(str(out / "tensorboard" / name), purge_step=0) as writer,
            tqdm(total=steps, desc=name, unit="step", disable=None) as bar,
        ):
            done = 0
            for epoch in range(epochs):
                losses = []
                started = time.perf_counter()
                try:
                    for index in torch.randperm(len(images.train_x), generator=shuffle).to(device).split(batch):
                        optimizer.zero_grad()
                        loss = cross_entropy(model(images.train_x[index]), images.train_y[index])
                        loss.backward()
                        optimizer.step()
                        losses.append(loss.detach())
                        bar.update()
                except KeyboardInterrupt:  # what was learned so far is written, and shown
                    stopped = True
                if not losses:
                    break
                losses = torch.stack(losses).tolist()  # the only host sync of the epoch
                done += len(losses)
                seconds += time.perf_counter() - started
                with torch.no_grad(), optimizer.averaged():
                    wrong = model(images.test_x).argmax(1) != images.test_y
                errors.append(100 * wrong.float().mean().item())
                for step, loss in enumerate(losses, start=1 + done - len(losses)):
                    writer.add_scalar("loss", loss, step)
                writer.add_scalar("error", errors[-1], done)
                recorder.to_tensorboard(writer)
                bar.set_postfix_str(f"{measured} error {errors[-1]:.2f} %")
                if name == "tower":
                    lr = optimizer.hyperparameters()["0.lr"].mean().item()
                    tqdm.write(f"epoch {epoch + 1:3}  loss {losses[-1]:.4f}  {measured} error {errors[-1]:6.2f} %  lr {lr:.3g}")
                if stopped:
                    break
        if not done:
            raise KeyboardInterrupt
        runs.append(
            {"run": name, "tower": str(spec), "error": errors[-1], "errors": errors, "ms_per_step": 1e3 * seconds / done}
            | {"hyperparameters": {key: value.mean().item() for key, value in optimizer.hyperparameters().items()}}
            | ({"stopped_after": done} if stopped else {})
        )
        return recorder

    recorder = train("tower", spec)
    recorder.to_csv(out / "hyperparameters.csv")
    recorder.to_png(out / "hyperparameters.png", title=f"{spec}, {dataset}")
    learned = [key.removeprefix("0.") for key in recorder.hypergradients if key.startswith("0.")]
    final = {name: runs[0]["hyperparameters"][f"0.{name}"] for name in learned}
    with contextlib.suppress(KeyboardInterrupt):
        for name, held in (("initial", spec.held()), ("learned", spec.held(**final))) if learned else ():
            if "stopped_after" not in runs[-1]:
                train(name, held)
    stopped = len(runs) < (3 if learned else 1) or "stopped_after" in runs[-1]

    result = {
        "command": {"tower": str(spec), "dataset": dataset, "epochs": epochs, "seed": seed, "batch": batch, "hidden": hidden},
        "measured": measured,
        "device": device,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "steps": steps,
        "runs": runs,
    }
    store.write(result, out / "result.json", indent=2)

    meaning = {"tower": "this tower", "initial": "its rule, initial values held", "learned": "its rule, learned values held"}
    print(f"\n{spec} on {dataset}: {epochs} epochs of {steps // epochs} steps, seed {seed}, {device}")
    print(f"{'run':31}{measured + ' error %':>18}{'ms/step':>9}   hyperparameters")
    for run in runs:
        values = [f"{name} {run['hyperparameters'][f'0.{name}']:.6g}" for name in learned]
        print(f"{meaning[run['run']]:31}{run['error']:18.2f}{run['ms_per_step']:9.2f}   {', '.join(values)}")
    print(f"\nTensorBoard  tensorboard --logdir {out / 'tensorboard'}")
    print(f"CSV          {out / 'hyperparameters.csv'}\nPNG          {out / 'hyperparameters.png'}\nresult       {out / 'result.json'}")
    if stopped:
        print("\nInterrupted: this is what there was until then.")
        raise typer.Exit(130)


app = cli.command(main)

if __name__ == "__main__":
    app()
