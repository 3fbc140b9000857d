"""An optimizer that is not a rule, observed by the displacement of the weights."""

from dataclasses import dataclass

from torch import Tensor

from ..domains import Positive
from ..rule import Rule, State, Values, hyper


@dataclass(frozen=True)
class BlackBox(Rule):
    """The step of any other optimizer with a learned lr: what `Hyper(torch.optim.Muon(…))` becomes.

        x = x − lr·d,      d = (x − x₁)/lr₁,  where one step of the other optimizer with its own lr₁ leads from x to x₁

    This is exact for displacements that are linear in lr, such as those of Muon, Shampoo or 8-bit Adam; otherwise lr/lr₁ is a factor
    on the displacement, which is learned all the same. The other optimizer keeps its state and its hyperparameters, lr₁ included.

    Args:
        lr: learning rate, at least 0, default 1e-3.
        optimizer: the class name of the other optimizer.
    """

    lr: float = hyper(1e-3, Positive())
    optimizer: str = ""

    def init(self, x: Tensor) -> State:
        return {}

    def direction(self, g: Tensor, state: State, h: Values, t: Tensor) -> tuple[Tensor, State]:
        # What arrives as the gradient is already d.
        return g, {}
