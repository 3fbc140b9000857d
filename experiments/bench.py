"""What a tower costs, compared with torch.optim and other packages: time of optimizer steps and of training steps, memory, compilation.

    python -m experiments.bench                 14 minutes on two cores, with nothing else running
    python -m experiments.bench --device cuda   the same on a GPU, timed with CUDA events

The optimizers take turns: each runs one block of steps, and this is repeated. Reported are the median over blocks with the fastest and
the slowest block, and the ratio to torch.optim.Adam(fused=True), the reference, timed in the same turns. From 10 million parameters on,
each optimizer takes turns with the reference alone. Compilation is measured in separate processes. Each part is written to bench.json as
soon as it is done, and `--only` repeats some parts. The tables are bench.md and the figure is bench.png, in experiments/results.
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import prodigyopt
import schedulefree
import torch
import typer
from gradient_descent_the_ultimate_optimizer import gdtuo
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.optim import Adam as TorchAdam
from tqdm import tqdm

import hyperopt
from experiments import cli, plots, provenance, store
from experiments.workloads import WORKLOADS
from hyperopt import Hyper

Step = Callable[[], object]

REFERENCE = "torch Adam, fused"
TOWERS = {
    "eager": "Adam / Adam",
    "eager, trust=None": "Adam(trust=None) / Adam",
    "eager, four learned": "Adam(learn=(lr, beta1, beta2, eps), trust=None) / Adam",
    "compiled": "Adam / Adam",
    "compiled, trust=None": "Adam(trust=None) / Adam",
    "compiled, four learned": "Adam(learn=(lr, beta1, beta2, eps), trust=None) / Adam",
    "eager, Schedule-Free": "ScheduleFree(Adam) / Adam",
    "compiled, Schedule-Free": "ScheduleFree(Adam) / Adam",
}
OTHERS = {
    REFERENCE: lambda params: TorchAdam(params, fused=True),
    "torch Adam, foreach": lambda params: TorchAdam(params, foreach=True),
    "prodigyopt": lambda params: prodigyopt.Prodigy(params),
    "schedulefree": lambda params: schedulefree.AdamWScheduleFree(params),
}
EVERYTHING = [*OTHERS, "gdtuo", *TOWERS]
SIZES = {  # number of tensors, elements of each
    "100 k in 4": (4, 25_000),
    "1 M in 4": (4, 250_000),
    "10 M in 4": (4, 2_500_000),
    "100 M in 4": (4, 25_000_000),
    "273 k in 65": (65, 4_200),
    "1 M in 50": (50, 20_000),
    "10 M in 50": (50, 200_000),
    "100 M in 50": (50, 2_000_000),
}
TRAININGS = {
    "MLP, batch 256": "m3",
    "ResNet-20, batch 128": "c3",
    "LSTM 2×128, 32×64": "r12",
    "GPT 4×128, 32×128": "gpt",
}
RECOMMENDED = [REFERENCE, "hyperopt.auto", "hyperopt.auto, compiled"]
RECOMMENDED_TRAININGS = {"MLP, batch 256": "m3", "CNN, batch 128": "cnn", "GPT 4×128, 32×128": "gpt"}
HEIGHTS = (0, 1, 2, 3, 5, 10)
COMPILE = {"65 tensors × 4,200": [4_200] * 65, "150 tensors, 50 of 300,000": [2_000] * 100 + [300_000] * 50}


def tower(name: str) -> Hyper:
    """The tower of a row: one of `TOWERS`, or an all-Adam tower for "height n"."""
    if name.startswith("height"):
        return Hyper.parse(" / ".join(["Adam"] * (1 + int(name.split()[1].rstrip(",")))))
    return Hyper.parse(TOWERS[name])


def optimizer(name: str, params: Iterable[Tensor]) -> torch.optim.Optimizer:
    """The optimizer of a row, for these parameters."""
    if name in OTHERS:
        made = OTHERS[name](params)
        if isinstance(made, schedulefree.AdamWScheduleFree):
            made.train()
        return made
    return tower(name).bind(params, compile="compiled" in name)


# ---- what is timed


class Tensors(nn.Module):
    """`count` parameters of `numel` elements each; the output is linear in them, so that their gradients are constant."""

    def __init__(self, count: int, numel: int) -> None:
        super().__init__()
        shape = (numel // 100, 100) if numel % 100 == 0 else (numel,)
        self.weights = nn.ParameterList(0.1 * torch.randn(shape) for _ in range(count))

    def forward(self, gradients: list[Tensor]) -> Tensor:
        return torch.stack([(g * w).sum() for g, w in zip(gradients, self.weights, strict=True)]).sum()


def step_alone(name: str, count: int, numel: int, device: str) -> Step:
    """An optimizer step on given gradients. For gdtuo the backward pass is timed too, as its step depends on that pass."""
    torch.manual_seed(0)
    model = Tensors(count, numel).to(device)
    gradients = [0.01 * torch.randn_like(w) for w in model.weights]
    if name == "gdtuo":
        return ultimate(model, lambda call, _: call(gradients))
    for w, g in zip(model.weights, gradients, strict=True):
        w.grad = g
    return optimizer(name, model.parameters()).step


def training_step(name: str, workload: str, device: str) -> Step:
    """A whole training step on random data: 50 batches in turn, as a single batch would be memorised."""
    torch.manual_seed(0)
    task = WORKLOADS[workload]
    model = task.make().to(device)
    if task.length:
        alphabet = next(m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding))
        text = torch.randint(alphabet, (50, task.batch, task.length + 1), device=device)
        xs, ys = text[..., :-1], text[..., 1:]
    else:
        shape = (3, 32, 32) if workload == "c3" else (784,)
        xs, ys = torch.rand(50, task.batch, *shape, device=device), torch.randint(10, (50, task.batch), device=device)

    def loss(call: Any, at: int) -> Tensor:
        return nn.functional.cross_entropy(call(xs[at % 50]).flatten(0, -2), ys[at % 50].flatten())

    if name == "gdtuo":
        return ultimate(model, loss)
    # hyperopt.auto reads from the module which tensors are hidden matrices.
    stepped = hyperopt.auto(model, compile="compiled" in name) if name.startswith("hyperopt.auto") else optimizer(name, model.parameters())
    at = 0

    def step() -> None:
        nonlocal at
        at += 1
        stepped.zero_grad()
        loss(model, at).backward()
        stepped.step()

    return step


def ultimate(model: nn.Module, loss: Callable[[Any, int], Tensor]) -> Step:
    """A training step with the package of the paper's authors: Adam whose four hyperparameters are learned by SGD."""
    wrapper = gdtuo.ModuleWrapper(model, optimizer=gdtuo.Adam(optimizer=gdtuo.SGD(1e-5)))  # pyright: ignore[reportArgumentType]
    wrapper.initialize()
    at = 0

    def step() -> None:
        nonlocal at
        at += 1
        wrapper.begin()
        value = loss(wrapper.forward, at)
        wrapper.zero_grad()
        value.backward(create_graph=True)
        wrapper.step()

    return step


# ---- timing


def timed(step: Step, steps: int, device: str) -> float:
    """Milliseconds per call, averaged over `steps` calls."""
    if device.startswith("cuda"):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(steps):
            step()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / steps
    started = time.perf_counter()
    for _ in range(steps):
        step()
    return 1e3 * (time.perf_counter() - started) / steps


def interleaved(make: Callable[[str], Step], names: list[str], blocks: int, seconds: float, device: str) -> dict[str, Any]:
    """Time optimizers in turn.

    Args:
        make: returns the function to time, by the name of the optimizer.
        names: the optimizers, the reference among them.
        blocks: number of turns of each optimizer.
        seconds: approximate length of a turn.
        device: where they run.

    Returns:
        For each name a dict with `ms`, the `spread` over blocks, and `ratio`, the median relative to that of the reference; or with
        `failed`, the error message.
    """
    steps: dict[str, Step] = {}
    failed: dict[str, str] = {}
    for name in names:
        try:
            step = make(name)
            timed(step, 16, device)  # a tower is compiled once all of its levels have learned: at height 10 in the fourteenth step
            steps[name] = step
        except (RuntimeError, NotImplementedError) as error:
            failed[name] = str(error).splitlines()[0]
    counts = {name: max(1, round(1e3 * seconds / timed(step, 2, device))) for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(blocks):
        for name, step in steps.items():
            times[name].append(timed(step, counts[name], device))
    reference = statistics.median(times[REFERENCE])
    rows: dict[str, Any] = {name: {"ms": spread(found), "ratio": statistics.median(found) / reference} for name, found in times.items()}
    return rows | {name: {"failed": reason} for name, reason in failed.items()}


def spread(values: list[float]) -> dict[str, float]:
    """Median, fastest and slowest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call `function(*arguments)` in a new process with an empty compiler cache."""
    with tempfile.TemporaryDirectory() as cache, multiprocessing.get_context("spawn").Pool(1, _environment, (cache,)) as pool:
        return pool.apply(function, arguments)


def _environment(cache: str) -> None:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache


def peak(name: str, device: str) -> float:
    """Peak memory of an optimizer, from its construction through eight steps, in multiples of the 10 million weights."""
    torch.manual_seed(0)
    model = Tensors(20, 500_000).to(device)
    for w in model.weights:
        w.grad = 0.01 * torch.randn_like(w)
    if device.startswith("cuda"):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        timed(optimizer(name, model.parameters()).step, 8, device)
        return (torch.cuda.max_memory_allocated() - before) / 4e7
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        timed(optimizer(name, model.parameters()).step, 8, device)
    found: Any = profile.profiler  # has an event for every allocation and release of a CPU tensor
    events = [event for event in found.kineto_results.events() if event.name() == "[memory]"]
    held = itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(held, default=0) / 4e7


def first_steps(name: str, sizes: list[int], device: str) -> float:
    """Seconds for construction and six steps, after which a compiled tower has taken its first compiled step."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(n, device=device)) for n in sizes]
    for p in params:
        p.grad = torch.randn_like(p)
    started = time.perf_counter()
    stepped = optimizer(name, params)
    for _ in range(6):
        stepped.step()
    return time.perf_counter() - started


# ---- the parts


def part_steps(device: str, blocks: int, seconds: float) -> dict[str, Any]:
    """The optimizer step alone."""
    found: dict[str, Any] = {}
    for title, (count, numel) in tqdm(SIZES.items(), desc="optimizer steps", unit="size", disable=None):
        names = EVERYTHING
        if count * numel >= 10**8:
            names = [n for n in EVERYTHING if n != "gdtuo" and "four" not in n]  # they take seconds per step and tens of gigabytes
        make = lambda name, count=count, numel=numel: step_alone(name, count, numel, device)  # noqa: E731
        if count * numel < 10**7:
            found[title] = interleaved(make, names, blocks, seconds, device)
            continue
        found[title] = {}
        for name in names[1:]:
            found[title] |= interleaved(make, [REFERENCE, name], max(3, blocks // 3), 3 * seconds, device)
    return found


def part_trainings(device: str, blocks: int, seconds: float) -> dict[str, Any]:
    """The whole training step."""
    names = [name for name in EVERYTHING if "trust" not in name]
    return {
        title: interleaved(lambda name, w=workload: training_step(name, w, device), names, blocks, 2 * seconds, device)
        for title, workload in tqdm(TRAININGS.items(), desc="training steps", unit="model", disable=None)
    }


def part_recommended(device: str, blocks: int, seconds: float) -> dict[str, Any]:
    """The whole training step with the recommended optimizer."""
    return {
        title: interleaved(lambda name, w=workload: training_step(name, w, device), RECOMMENDED, 2 * blocks, 2 * seconds, device)
        for title, workload in tqdm(RECOMMENDED_TRAININGS.items(), desc="hyperopt.auto", unit="model", disable=None)
    }


def part_heights(device: str, blocks: int, seconds: float) -> dict[str, Any]:
    """The MLP's training step against the height of the tower."""
    names = [REFERENCE, *(f"height {h}{how}" for how in ("", ", compiled") for h in HEIGHTS)]
    return interleaved(lambda name: training_step(name, "m3", device), names, 2 * blocks, seconds, device)


def part_memory(device: str, *_: Any) -> dict[str, Any]:
    """Peak memory."""
    copies = {
        name: peak(name, device) for name in tqdm([n for n in EVERYTHING if n != "gdtuo"], desc="memory", unit="optimizer", disable=None)
    }
    return {name: {"copies": value, "more than Adam": value - copies[REFERENCE]} for name, value in copies.items()}


def part_compile(device: str, *_: Any) -> dict[str, Any]:
    """Seconds for the first six steps, compilation included."""
    return {
        title: {name: alone(first_steps, name, sizes, device) for name in ("eager", "compiled")}
        for title, sizes in tqdm(COMPILE.items(), desc="compilation", unit="size", disable=None)
    }


PARTS = {
    "steps": part_steps,
    "trainings": part_trainings,
    "recommended": part_recommended,
    "heights": part_heights,
    "memory": part_memory,
    "compile": part_compile,
}


# ---- tables and figure


def table(result: dict[str, Any]) -> str:
    """The results in Markdown."""
    lines = [provenance.caption(result), ""]

    def ratios(title: str, columns: dict[str, dict[str, Any]], names: list[str]) -> None:
        lines.extend([f"{title}: ms of {REFERENCE}, the others as ratios to it (fastest to slowest block).", ""])
        lines.extend([f"| | {' | '.join(columns)} |", "| --- |" + " --- |" * len(columns)])
        for name in names:
            lines.append(f"| {name} | " + " | ".join(cell(name, rows) for rows in columns.values()) + " |")
        lines.append("")

    def cell(name: str, rows: dict[str, Any]) -> str:
        row = rows.get(name)
        if row is None or "failed" in row:
            return "–" if row is None else "failed"
        ms = row["ms"]
        if name == REFERENCE:
            return "{median:.3g} ms ({min:.3g} to {max:.3g})".format(**ms)
        scale = row["ratio"] / ms["median"]
        return f"{row['ratio']:.2f} ({ms['min'] * scale:.2f} to {ms['max'] * scale:.2f})"

    if "steps" in result:
        ratios("Optimizer step alone, parameters in tensors", result["steps"], EVERYTHING)
        lines += ["By words moved (read or written, 7 for Adam) learning lr takes 11: a ratio of 1.57; with trust 14: 2.", ""]
    if "trainings" in result:
        ratios("Training step", result["trainings"], [n for n in EVERYTHING if "trust" not in n])
    if "recommended" in result:
        ratios("Training step with the recommended optimizer", result["recommended"], RECOMMENDED)
    if "heights" in result:
        rows = result["heights"]
        columns = {
            how or "eager": {f"height {h}": rows[f"height {h}{c}"] for h in HEIGHTS} for how, c in (("", ""), ("compiled", ", compiled"))
        }
        ratios("Training step of the MLP, all-Adam towers", columns, [f"height {h}" for h in HEIGHTS])
    if "memory" in result:
        lines += [
            "| peak memory, 10 M parameters | copies of the model, beside weights and gradients | more than torch's Adam |",
            "| --- | --- | --- |",
        ]
        lines += [f"| {name} | {row['copies']:.2f} | {row['more than Adam']:.2f} |" for name, row in result["memory"].items()] + [""]
    if "compile" in result:
        lines += ["| first six steps, s | eager | compiled, cache empty |", "| --- | --- | --- |"]
        lines += [f"| {title} | {row['eager']:.2f} | {row['compiled']:.1f} |" for title, row in result["compile"].items()] + [""]
    return "\n".join(lines)


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw a panel for each part that was measured: training steps, optimizer steps, and the training step against height."""
    widths = {"trainings": 3, "steps": 4, "heights": 2}
    parts = [part for part in widths if part in result] or list(widths)
    figure = Figure(figsize=(1.5 * sum(widths[part] for part in parts), 4.6), layout="constrained")
    panels = figure.subplots(1, len(parts), width_ratios=[widths[part] for part in parts], squeeze=False)[0]
    shown = ["torch Adam, foreach", "schedulefree", "prodigyopt", "gdtuo", "eager", "compiled"]
    for axes, part in zip(panels, parts, strict=True):
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_ylabel("time / torch.optim.Adam(fused=True)")
        if part == "heights":
            for how, end in (("eager", ""), ("compiled", ", compiled")):
                axes.plot(HEIGHTS, [result[part][f"height {h}{end}"]["ratio"] for h in HEIGHTS], "o-", label=how)
            axes.set(title="training step of the MLP", xlabel="height of the tower")
            axes.legend(fontsize=7)
            continue
        columns = result[part]
        for i, name in enumerate(shown):
            at = [j + (i - len(shown) / 2 + 0.5) * 0.13 for j in range(len(columns))]
            axes.bar(at, [rows.get(name, {}).get("ratio", math.nan) for rows in columns.values()], 0.13, label=name)
        axes.set(title="training step" if part == "trainings" else "optimizer step alone", yscale="log")
        plots.decimal_ticks(axes.yaxis)
        axes.set_xticks(range(len(columns)), [title.replace(", ", "\n").replace(" in ", "\nin ") for title in columns], fontsize=7)
    bars = [axes for axes, part in zip(panels, parts, strict=True) if part != "heights"]
    if bars:
        columns = len(shown) if len(parts) > 1 else 3
        figure.legend(*bars[0].get_legend_handles_labels(), loc="outside upper center", ncols=columns, fontsize=7)
    figure.supxlabel(provenance.caption(result, len(parts) * 100), fontsize=6)
    figure.savefig(path, dpi=110)


def main(
    only: Annotated[list[str] | None, typer.Option(help=f"measure only these parts: {', '.join(PARTS)}; may be repeated")] = None,
    blocks: Annotated[int, typer.Option(min=3, help="number of turns of each optimizer")] = 15,
    seconds: Annotated[float, typer.Option(help="length of a turn in seconds")] = 0.1,
    device: cli.Device = "cpu",
    figures: cli.Figures = False,
    out: cli.Out = cli.RESULTS,
) -> None:
    """Measure all parts, or only some of them, and draw the figure."""
    unknown = set(only or []) - PARTS.keys()
    if unknown:
        raise typer.BadParameter(f"no part {', '.join(unknown)}: give some of {', '.join(PARTS)}")
    out.mkdir(parents=True, exist_ok=True)
    name = "bench" if device == "cpu" else f"bench_{device.partition(':')[0]}"
    path = out / f"{name}.json"
    result = store.read(path) if path.exists() and (only or figures) else {}
    for part in [] if figures else only or PARTS:
        stamp = provenance.stamp()
        commits = {**dict.fromkeys(result.keys() & PARTS, result.get("commit")), **result.get("commits", {}), part: stamp["commit"]}
        result |= {**stamp, "commits": commits, part: PARTS[part](device, blocks, seconds)}
        result["commit"] = ", ".join(dict.fromkeys(commits.values()))
        store.write(result, path, indent=1)
    text = table(result)
    (out / f"{name}.md").write_text(text + "\n")
    draw(result, out / f"{name}.png")
    print(text)


app = cli.command(main)

if __name__ == "__main__":
    app()
