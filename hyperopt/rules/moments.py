"""What rules share whose moments are corrected for bias."""

from typing import ClassVar

from ..rule import Rule


class Moments(Rule):
    """A rule that divides moments by 1 − beta^t, always or by its option `bias_correction`: then no such beta may be 1."""

    first_moment = ("beta1",)
    corrected: ClassVar[tuple[str, ...]] = ("beta1", "beta2")

    def __post_init__(self) -> None:
        super().__post_init__()
        if vars(self).get("bias_correction", True) and 1 in map(self.value, self.corrected):
            remedy = ", or bias_correction=False" if "bias_correction" in vars(self) else ""
            names = " or ".join(self.corrected)
            raise ValueError(f"{type(self).__name__}({names} = 1) divides by 1 - beta^t = 0: give a beta below 1{remedy}")
