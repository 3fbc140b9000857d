"""The functions of passes.cpp, by ctypes: built with the package where it was installed, or compiled when first wanted."""

import ctypes
import zlib
from enum import IntEnum
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch  # before the passes are loaded, so that they find torch's OpenMP and do not start threads of their own
from torch import Tensor
from torch.autograd import forward_ad

SOURCE = Path(__file__).with_name("passes.cpp")
# Elements of a tensor that a thread handles at a time: few enough to share 100,000 out evenly, and with millions more of them, as memory is
# read 5 % faster.
BLOCK, LONG_BLOCK, LONG = 2**13, 2**15, 2**20
# The longest smaller side of a matrix that is orthogonalised in C++: above, the products of a library are faster. And its elements: up to
# there C++ is faster on two threads, as far as it was measured.
SMALL, FEW = 128, 2**20
# After torch's own flags: it compiles its kernels without vectorising loops, without FMA, and with the errno of every root.
FLAGS = ("-O3", "-fno-math-errno", "-ftree-loop-vectorize", "-ffp-contract=fast")


class Column(IntEnum):
    """What the table of pointers holds for each tensor, column by column; null where a rule has no such thing."""

    X = 0  # weights
    G = 1  # gradient
    D = 2  # the direction at lr = 1; null: Adam's, made of the next two
    M = 3  # first moment
    V = 4  # second moment
    GAP = 5  # ScheduleFree's: from its average to what lr moves
    AVERAGE = 6  # Averaged's
    ZX = 7  # tangent of x along log lr; null: nothing is learned
    ZA = 8  # tangent of the gap, or of the average
    T = 9  # steps taken, one number a chunk, as what follows
    WEIGHT = 10  # ScheduleFree's Σlr²
    ZWEIGHT = 11  # its tangent
    MIX = 12  # ScheduleFree's beta1 of the step before
    LAG = 13  # mean of <g, gap>; null: its average does not forget
    LAG_SIZE = 14  # mean of |<g, gap>|
    DECAY = 15  # decoupled weight decay; null: none


class Value(IntEnum):
    """The hyperparameters, each a number of its own; null where a rule has no such thing."""

    REST1 = 0  # 1 − beta1
    REST2 = 1  # 1 − beta2
    EPS = 2
    BETA = 3  # ScheduleFree's beta1
    REST_DECAY = 4  # 1 − decay of Averaged
    FORGET = 5  # ScheduleFree's forget
    THROUGH = 6  # ScheduleFree's through; null: 1
    CAUTIOUS = 7  # 1: weight decay of elements with d·x ≥ 0 alone
    LARGEST = 8  # weights decay as if they were no larger


def block(elements: int) -> int:
    """The length of the blocks for tensors with this many elements in all."""
    return BLOCK if elements < LONG else LONG_BLOCK


@cache
def installed() -> ctypes.CDLL | None:
    """The passes that were built with the package; None where they were not, or from another source, or for another CPU."""
    for suffix in EXTENSION_SUFFIXES:
        path = SOURCE.with_name(f"_passes{suffix}")
        if path.exists():
            try:
                functions = _declared(ctypes.CDLL(str(path)))
            except (OSError, AttributeError):
                continue
            # An editable install keeps what it built when the source changes.
            if functions.usable() and functions.source() == zlib.crc32(SOURCE.read_bytes()):
                return functions
    return None


@cache
def built() -> ctypes.CDLL | None:
    """`installed()`, or the passes compiled now as torch.compile compiles its own kernels; None where no compiler works."""
    from torch._inductor.codecache import CppCodeCache
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    if functions := installed():
        return functions
    try:
        functions = _declared(CppCodeCache.load(SOURCE.read_text(encoding="utf-8"), extra_flags=FLAGS))
    except (CppCompileError, InvalidCxxCompiler, OSError):
        return None
    return functions if functions.usable() else None


def orthogonal(
    matrices: Tensor, coefficients: tuple[float, float, float], steps: int, scale: Tensor, least: float, follow: bool
) -> Tensor | None:
    """`newton_schulz` of muon.py in C++; None where the matrices are not small and on a CPU in float32, or derivatives are wanted."""
    transformed = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if transformed or type(matrices) is not Tensor or not matrices.is_cpu or matrices.dtype != torch.float32:
        return None
    count, rows, columns = matrices.shape
    functions = installed() if count and 1 < min(rows, columns) <= SMALL and rows * columns <= FEW else None
    if functions is None or any(t.requires_grad or forward_ad.unpack_dual(t).tangent is not None for t in (matrices, scale)):
        return None
    matrices, scale = matrices.resolve_neg().contiguous(), scale.to(matrices)
    found = torch.empty_like(matrices)
    abc = (ctypes.c_float * 3)(*coefficients)
    pointers = matrices.data_ptr(), found.data_ptr()
    functions.orthogonal(torch.get_num_threads(), count, rows, columns, *pointers, steps, abc, least, follow, scale.data_ptr())
    return found


def _declared(functions: ctypes.CDLL) -> ctypes.CDLL:
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    table = [number, pointer, number, pointer, pointer]  # blocks, block, count, tensors, values
    functions.look.argtypes = [number, number, *table, pointer, pointer]
    functions.take.argtypes = [number, *table, number, pointer, pointer, pointer, pointer]
    functions.look.restype, functions.take.restype = ctypes.c_int, None
    functions.orthogonal.argtypes = [number, number, number, number, pointer, pointer, number, pointer, ctypes.c_float, number, pointer]
    functions.orthogonal.restype = None
    functions.usable.argtypes, functions.usable.restype = [], ctypes.c_int
    functions.source.argtypes, functions.source.restype = [], ctypes.c_uint32
    return functions
