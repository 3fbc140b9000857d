"""An optimizer for which there is no rule: followed by how far it moves the weights."""

from dataclasses import dataclass

from torch import Tensor

from ..domains import Positive
from ..rule import Rule, State, Values, hyper


@dataclass(frozen=True)
class BlackBox(Rule):
    """The step of any other optimizer, with its lr learned: what `Hyper(torch.optim.Muon(…))` becomes.

        x = x − lr·d,      d = (x − x₁)/lr₁:  the other optimizer takes x to x₁ with its own lr₁, which stays as it is

    Exact where its displacement is linear in its lr, as that of Muon, Shampoo or an 8-bit Adam; otherwise lr/lr₁ is a factor on
    the displacement, learned all the same. State, and hyperparameters other than lr, stay with the other optimizer.

    Args:
        lr: step size.
        optimizer: the name of the other optimizer's class.
    """

    lr: float = hyper(1e-3, Positive())
    optimizer: str = ""

    def init(self, x: Tensor) -> State:
        return {}

    def update(self, x: Tensor, g: Tensor, state: State, h: Values, t: Tensor) -> tuple[Tensor, State]:
        return x - h.lr * g, {}

    def linear_in_lr(self) -> bool:
        return True
