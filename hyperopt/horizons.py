"""For how many past steps a hyperparameter is held responsible."""

import math
from collections.abc import Mapping, Sequence
from typing import Any


def check(argument: str, value: Any) -> None:
    """Raise ValueError unless `value` is a number of steps, from 1 to infinity."""
    if type(value) not in (int, float) or not value >= 1:
        raise ValueError(f"{argument} = {value!r} is outside [1, inf]: give a number of steps (1: the paper's method) or math.inf")


def check_given(given: Any, known: Sequence[str], rule: str) -> None:
    """Raise ValueError unless `given` is "default", a horizon, or one for each of some hyperparameters of a rule, which are `known`."""
    if not isinstance(given, Mapping):
        if given != "default":
            check("horizon", given)
        return
    for name, value in given.items():
        if name not in known:
            raise ValueError(f"horizon names {name!r}, which {rule} does not have: it has {', '.join(known)}")
        check(f"horizon[{name!r}]", value)


def check_learned(given: Any, learned: Sequence[str], rule: str) -> None:
    """Raise ValueError if a horizon was given for a hyperparameter of a rule that is not learned."""
    for name in given if isinstance(given, Mapping) else ():
        if name not in learned:
            remedy = f"add {name!r} to learn, or leave it out of horizon"
            raise ValueError(f"horizon names {name!r} of {rule}, which is not learned ({', '.join(learned)} is): {remedy}")


def check_graph(horizons: Mapping[str, float]) -> None:
    """Raise ValueError unless all horizons are 1, as the graph of one update has it."""
    for name, horizon in horizons.items():
        if horizon != 1:
            remedy = "give horizon=1, or strategy='tangents'"
            raise ValueError(f"strategy='graph' keeps one update to learn {name} from, got horizon = {horizon!r}: {remedy}")


def text(horizons: Mapping[str, float]) -> str:
    """The horizons of what is learned: one number where all are equal."""
    one = len(set(horizons.values())) == 1
    return f"{next(iter(horizons.values())):g}" if one else ", ".join(f"{value:g} of {name}" for name, value in horizons.items())


def gamma(horizon: float) -> float:
    """γ = 1 − 1/horizon, by which tangents are multiplied at every step."""
    return 1.0 - 1.0 / horizon if horizon < math.inf else 1.0
