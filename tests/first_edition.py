"""What the first edition computed for every tower of tests/cases.py, recorded before its internals were redrawn.

    python tests/first_edition.py       in a checkout of the first edition: writes tests/first_edition.json

Gradients are given and do not depend on the weights, so that rounding is not amplified by the training itself. Several hyperparameters are
learned by SGD: some hypergradients of the first steps are zero but for rounding, and Adam would divide them by their size.
"""

import json
from pathlib import Path

import torch
from cases import CASES
from torch import nn

from hyperopt import SGD, Adam, AdamW, Averaged, Hyper, ScheduleFree

STEPS = 60
# Rules that the first edition did not have.
LATER = ("muon", "adamw-cautious", "spike-aware-adam", "spike-aware-adam-slowed", "spike-aware-adam-decay")
HORIZON = 1000  # of everything, in the first edition
RECORD = Path(__file__).with_suffix(".json")
DTYPES = {"float32": torch.float32, "float64": torch.float64}


def towers() -> dict[str, Hyper]:
    """For each row its rule with lr learned, and with everything learned that the row names; some averages."""
    cases = [case for case in CASES if case.name not in LATER]
    found = {f"{case.name}, lr": Hyper(case.rule).stack(Adam) for case in cases}
    # The first edition had no prior.
    every = {case.name: Hyper(case.rule, learn=case.learnable, horizon=HORIZON, prior=None) for case in cases if len(case.learnable) > 1}
    found |= {f"{name}, all": tower.stack(SGD, lr=0.01) for name, tower in every.items()}
    # Of height 1: the first edition had no pace for what is learned above level 0.
    found["adam, tree"] = Hyper(Adam, lr=0.01, horizon=HORIZON, prior=None).stack(lr=Adam, beta1=Hyper(SGD, lr=0.1))
    found["adam, too high"] = Hyper(Adam, lr=10.0).stack(Adam)
    found["adam, too low"] = Hyper(Adam, lr=1e-7).stack(Adam)
    found["adam, horizon 1"] = Hyper(Adam, lr=0.01, horizon=1).stack(Adam)
    found["adam, trust=None"] = Hyper(Adam, lr=0.01, trust=None).stack(Adam)
    found["adam, per tensor"] = Hyper(Adam, lr=0.01, per="tensor").stack(Adam)
    found["adam, alone"] = Hyper(Adam, lr=0.01)
    for base in (Adam, AdamW, SGD):
        found[f"schedule-free {base.__name__}"] = Hyper(ScheduleFree(base), lr=0.01).stack(Adam)
    found["schedule-free Adam, two"] = Hyper(ScheduleFree(Adam), lr=0.01, learn=("lr", "beta1"), prior=None).stack(SGD, lr=0.01)
    found["averaged Adam"] = Hyper(Averaged(Adam), lr=0.01).stack(Adam)
    return found


def run(tower: Hyper, dtype: torch.dtype, *, compile: bool = False) -> dict[str, list[float]]:
    """The weights after the last step, and the hyperparameters of level 0 after every twentieth."""
    generator = torch.Generator().manual_seed(0)
    shapes = (4, 3), (5,), (2, 6)
    params = [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes]
    means = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in params]
    optimizer = tower.bind(params, compile=compile)
    found: dict[str, list[float]] = {}
    for at in range(1, STEPS + 1):
        for p, mean in zip(params, means, strict=True):
            p.grad = (mean + torch.randn(p.shape, generator=generator, dtype=torch.float64)).to(dtype)
        optimizer.step()
        if at % 20 == 0:
            for name, value in optimizer.hyperparameters().items():
                if name.startswith("0."):
                    found.setdefault(name, []).extend(value.double().reshape(-1).tolist())
    found["weights"] = torch.cat([p.detach().reshape(-1) for p in params]).double().tolist()
    return {name: values for name, values in found.items() if name == "weights" or len(set(values)) > 1}


if __name__ == "__main__":
    torch.set_num_threads(1)
    record = {f"{name}, {kind}": run(tower, dtype) for name, tower in towers().items() for kind, dtype in DTYPES.items()}
    digits = {"float32": 9, "float64": 16}
    short = {
        name: {key: [float(f"{v:.{digits[name.rsplit(', ')[-1]]}g}") for v in values] for key, values in found.items()}
        for name, found in record.items()
    }
    RECORD.write_text("{\n" + ",\n".join(f"{json.dumps(name)}: {json.dumps(found)}" for name, found in short.items()) + "\n}\n")
