"""The rules, one a file."""

from .adadelta import Adadelta
from .adagrad import Adagrad
from .adam import Adam, AdamW
from .adamax import Adamax
from .adan import Adan
from .adashift import AdaShift
from .adopt import ADOPT
from .averaged import Averaged
from .exponent import Exponent, Padam
from .lion import Lion
from .muon import Muon
from .nadam import NAdam
from .radam import RAdam
from .rmsprop import RMSprop
from .schedule_free import ScheduleFree
from .sgd import SGD
from .spike_aware_adam import SpikeAwareAdam
from .unified import Unified
from .yogi import Yogi

# fmt: off
__all__ = [
    "ADOPT", "SGD", "AdaShift", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "Adan", "Averaged", "Exponent", "Lion", "Muon", "NAdam",
    "Padam", "RAdam", "RMSprop", "ScheduleFree", "SpikeAwareAdam", "Unified", "Yogi",
]
# fmt: on
