import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, baddbmm, cat, expm1, eye, finfo, lerp

from ..body.functions import orthogonal
from ..domains import Positive, UnitInterval
from ..rule import Rule, State, Values, hyper, root, square
from .split import Splits

EPS = 1e-7  # the least norm that is divided by, as in torch
FELT = 1e-2  # a relative error of eigenvalues that are 0 but for rounding
# The scale of an orthogonal factor of `rows` x `columns`, under torch's names.
SCALES = {
    "match_rms_adamw": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
    "original": lambda rows, columns: math.sqrt(max(1, rows / columns)),
    "spectral_unclamped": lambda rows, columns: math.sqrt(rows / columns),
}


@dataclass(frozen=True)
class Muon(Rule, metaclass=Splits):
    """Muon: momentum, orthogonalised. Equal to `torch.optim.Muon` at the same precision.

        m = momentum·m + (1 − momentum)·g
        n = momentum·m + (1 − momentum)·g   (nesterov; otherwise n = m)
        U·S·Vᵀ = n
        x = x − lr·(.2·√max(A, B)·U·Vᵀ + weight_decay·x)        for a matrix of A rows and B columns

    U·Vᵀ is approximated by `ns_steps` steps of X ← a·X + b·(XXᵀ)X + c·(XXᵀ)²X from n/‖n‖. With Jordan's a, b, c, singular values end
    between .68 and 1.21, and not at 1, and those below two thousandths of the norm of n may stay smaller. The entries of a step have a
    root mean square of about .2·lr, which is that of Adam's steps, so that both can share one lr.

    These steps are as large for a gradient that has all but vanished as for any other, while Adam's shrink with it. With norm_decays =
    (a, b) Muon's do too: for each tensor they are as large as the norm of its last few gradients is beside that of many.

        u = a·u + (1 − a)·‖n‖²,   û = u / (1 − a^t)
        v = b·v + (1 − b)·‖n‖²,   v̂ = v / (1 − b^t)         the step is √(û / v̂) times as large

    With smoothing = a, g is replaced by the mean of the last few gradients, (1 − a)·Σ aᵏ·g of k steps ago, with the correction of bias.
    Where momentum is left out, as under `ScheduleFree`, this takes noise off before it is made as large as everything else.

    A convolution filter is the matrix (out, in·k²). A vector is a matrix with one column: its step is along its gradient, normalised. A
    tensor may hold several matrices, one below the other: a parameter group's entry `blocks` says how many, for all tensors or each, and
    `bind(model)` finds them. Embeddings, the output head, norms and biases are usually better served by Adam, in the same tower:
    `Muon | Adam`.

    Args:
        lr: learning rate, at least 0, default 1e-3; 0.5 above level 0, where it moves raw hyperparameters.
        momentum: decay rate of the momentum, in [0, 1], default 0.95; at 0 there is no m.
        weight_decay: decoupled weight decay, at least 0, default 0.1, as in torch; 0 above level 0.
        cautious: decay of those elements alone whose size the step does not increase (Chen et al. 2025, arXiv 2510.12402), default False.
        nesterov: Nesterov momentum, default True.
        adjust_lr_fn: the scale of U·Vᵀ: "match_rms_adamw", default, as above; "original", √max(1, A/B), which torch takes if nothing is
            said; or "spectral_unclamped", √(A/B).
        norm_decays: a and b, in (0, 1), or None, default: no such factor.
        smoothing: a, in [0, 1), default 0: none. Not learned.
        ns_steps: number of Newton-Schulz steps, default 5.
        ns_coefficients: a, b, c, default Jordan's (3.4445, −4.775, 2.0315).
        rows: orthogonalise blocks of at most this many rows by themselves where both sides of a matrix are longer. The cost is then
            rows/min(A, B) of that of the whole. Default: None, whole matrices.

    Raises:
        ValueError: a value outside its domain, or an option that is not one of those above.

    Source: Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon); Liu et al. 2025 (arXiv 2502.16982) for the scale; Khaled et al.
    2025 (MuonBP, arXiv 2510.16981) for blocks, here without its whole steps in between; torch.optim.Muon, which computes U·Vᵀ in bfloat16
    and not in the dtype of the state.

    >>> from hyperopt import Adam, Hyper, Muon
    >>> Hyper(Muon | Adam, lr=0.01).stack(Adam)
    Hyper('(Muon | Adam)(lr=0.01) / Adam')
    """

    lr: float = hyper(1e-3, Positive(), above=0.5)
    momentum: float = hyper(0.95, UnitInterval(), horizon=1)
    weight_decay: float = hyper(0.1, Positive(), above=0.0)
    cautious: bool = False
    nesterov: bool = True
    adjust_lr_fn: str = "match_rms_adamw"
    norm_decays: tuple[float, float] | None = None
    smoothing: float = 0.0
    ns_steps: int = 5
    ns_coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315)
    rows: int | None = None
    elementwise: ClassVar[bool] = False
    first_moment = ("momentum",)
    decoupled = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adjust_lr_fn not in SCALES:
            raise ValueError(f"Muon(adjust_lr_fn={self.adjust_lr_fn!r}) is none of {', '.join(SCALES)}")
        for name, value in (("ns_steps", self.ns_steps), ("rows", self.rows)):
            if not (value is None and name == "rows") and (type(value) is not int or value < 1):
                raise ValueError(f"Muon({name}={value!r}) must be a whole number, at least 1")
        decays = self.norm_decays
        pair = isinstance(decays, tuple) and len(decays) == 2 and all(type(d) is float and 0 < d < 1 for d in decays)
        if decays is not None and not pair:
            raise ValueError(f"Muon(norm_decays={decays!r}) must be None or two floats between 0 and 1, such as (0.9, 0.999)")
        if type(self.smoothing) not in (int, float) or not 0 <= self.smoothing < 1:
            raise ValueError(f"Muon(smoothing={self.smoothing!r}) must be a number from 0 on and below 1")
        numbers = self.ns_coefficients
        if not isinstance(numbers, tuple) or [type(c) for c in numbers] != [float] * 3:
            raise ValueError(f"Muon(ns_coefficients={numbers!r}) must be three floats, such as (3.4445, -4.775, 2.0315)")

    def init(self, x: Tensor) -> State:
        m = {"m": x.new_zeros(x.shape)} if self.momentum != 0 else {}
        m |= {"smoothed": x.new_zeros(x.shape)} if self.smoothing else {}
        return m | ({"norm_now": x.new_zeros(()), "norm": x.new_zeros(())} if self.norm_decays else {})

    def direction(self, g: Tensor, state: State, h: Values, t: Tensor) -> tuple[Tensor, State]:
        new: State = {}
        if self.smoothing:  # the mean with the correction of bias, in which the last gradient's share falls from 1 to 1 − smoothing
            share = (self.smoothing - 1) / expm1(t * math.log(self.smoothing))
            g = new["smoothed"] = lerp(state["smoothed"], g, share)
        n = g
        if self.momentum != 0:
            m = new["m"] = lerp(state["m"], g, h.one_minus("momentum"))
            n = lerp(g, m, h.momentum) if self.nesterov else m
        scale = n.new_ones(())
        if self.norm_decays:
            size = square(n.norm())
            means = []
            for name, decay in zip(("norm_now", "norm"), self.norm_decays, strict=True):
                new[name] = lerp(state[name], size, 1 - decay)
                means.append(new[name] / -expm1(t * math.log(decay)))
            scale = root(means[0] / means[1].clamp_min(finfo(size.dtype).tiny))
        return self._orthogonal(n, scale), new

    def _orthogonal(self, n: Tensor, scale: Tensor) -> Tensor:
        """`n` with each of its matrices orthogonalised and scaled."""
        rows = n.shape[0] if n.dim() else 1
        matrices = n.reshape(self.role.blocks, rows // self.role.blocks, n.numel() // max(rows, 1))
        count = 1
        if self.rows is not None and min(matrices.shape[1:]) > self.rows:
            count = math.ceil(matrices.shape[1] / self.rows)
        # Blocks of one size are one batch: there are two, of k + 1 rows and of k.
        k, more = divmod(matrices.shape[1], count)
        sizes = [(k + 1, more), (k, count - more)]
        pieces = matrices.split([size * times for size, times in sizes], dim=1)
        parts = [self._scaled(piece, times, scale) for piece, (size, times) in zip(pieces, sizes, strict=True) if times]
        return (parts[0] if len(parts) == 1 else cat(parts, dim=1)).reshape(n.shape)

    def _scaled(self, matrices: Tensor, times: int, scale: Tensor) -> Tensor:
        """Matrices with each of their `times` blocks of rows orthogonalised and scaled."""
        count, rows, columns = matrices.shape
        blocks = matrices.reshape(count * times, rows // times, columns)
        scale = scale * SCALES[self.adjust_lr_fn](rows // times, max(columns, 1))
        return newton_schulz(blocks, self.ns_coefficients, self.ns_steps, scale).view(matrices.shape)


def newton_schulz(matrices: Tensor, coefficients: tuple[float, float, float], steps: int, scale: Tensor) -> Tensor:
    """scale·U·Vᵀ of each matrix U·S·Vᵀ of a batch, approximately; 0 for a matrix of zeros."""
    a, b, c = coefficients
    # A wide matrix is read twice and not in every step: x·xᵀ is followed instead, and so is the product of what the steps multiply x with,
    # a + q each. All of these are polynomials of the first x·xᵀ, so that their order is no matter. Eigenvalues that are 0 grow by a² in a
    # step, and so do their rounding errors: where these would be felt, x·xᵀ is computed anew.
    short, long = sorted(matrices.shape[1:])
    follow = long >= 2 * short and abs(a) ** (2 * (steps - 1)) * finfo(matrices.dtype).eps <= FELT
    if (found := orthogonal(matrices, coefficients, steps, scale, EPS, follow)) is not None:
        return found
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / root((x * x).sum((1, 2), keepdim=True)).clamp_min(EPS)
    gram = x @ x.mT
    if not follow:
        for step in range(steps):
            gram = x @ x.mT if step else gram
            x = baddbmm(x, baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        x = x * scale
        return x.mT if tall else x
    product = (scale * eye(short, dtype=x.dtype, device=x.device)).expand_as(gram)
    for step in range(steps):
        q = baddbmm(gram, gram, gram, beta=b, alpha=c)
        product = baddbmm(product, product, q, beta=a)
        if step < steps - 1:
            once = baddbmm(gram, q, gram, beta=a)
            gram = baddbmm(once, once, q, beta=a)
    x = product @ x
    return x.mT if tall else x
