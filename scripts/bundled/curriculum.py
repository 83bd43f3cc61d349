"""The stages of training as data: the mix, the length of rows, the recall that ends a stage. Runs nothing.

Why this order: long random repeats make induction form; retelling facts in short rows is the densest supervision of key
matching and starts the second circuit, which questions alone do not; after that each doubling of length is cheap.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

TOKENS_PER_STEP = 2048


@dataclass(frozen=True)
class Gate:
    """`task` evaluated on fresh rows of the stage's length must reach `share`, counted by answer tokens or by whole
    answers.
    """

    task: str
    share: float
    whole: bool = True


@dataclass(frozen=True)
class Stage:
    """Steps of TOKENS_PER_STEP tokens in rows of `length`, from `least` to `most` steps, ended by its gates in between.

    mix: task name -> share of documents. learning_rate: (at the first step, at step `most`), linear.
    open_share, single_share, made_up_share: see `facts.Lexicon`. shortest: least tokens of a packed document.
    """

    name: str
    length: int
    most: int
    mix: Mapping[str, float]
    gates: tuple[Gate, ...] = ()
    least: int = 100
    open_share: float = 0.6
    single_share: float = 0.5
    made_up_share: float = 0.0
    learning_rate: tuple[float, float] = (2e-3, 2e-3)
    shortest: int = 64
    rows: int = field(default=0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", self.rows or max(1, TOKENS_PER_STEP // self.length))

    def rate(self, step: int) -> float:
        first, last = self.learning_rate
        return first + (last - first) * min(step / self.most, 1.0)


_PRIMER = dict(rand=0.25, copy=0.15, kv=0.40, hop=0.10, needle=0.05, var=0.05)
_RESTATE = dict(restate=0.55, kv=0.20, hop=0.08, needle=0.05, copy=0.05, text=0.07)
_QUESTIONS = dict(
    restate=0.25, kv=0.32, hop=0.15, needle=0.10, var=0.03, copy=0.03, text=0.08, talk=0.02, dialogue=0.02
)
_GROWING = dict(restate=0.12, kv=0.24, hop=0.18, needle=0.12, var=0.03, copy=0.03, talk=0.04, dialogue=0.09, text=0.15)
_OPENING = dict(restate=0.15, kv=0.33, hop=0.14, needle=0.08, var=0.03, copy=0.04, talk=0.05, dialogue=0.08, text=0.10)
_LONG = dict(restate=0.04, kv=0.30, hop=0.13, needle=0.15, var=0.04, copy=0.03, talk=0.04, dialogue=0.10, text=0.17)
_SPEAKING = dict(kv=0.15, hop=0.08, needle=0.10, restate=0.02, copy=0.04, talk=0.33, dialogue=0.18, text=0.10)
_GREETING = dict(kv=0.07, hop=0.04, needle=0.06, talk=0.79, dialogue=0.04)

_RANDOM = (Gate("rand", 0.85, whole=False),)
_VALUES = (Gate("restate", 0.80, whole=False),)
_SURE = (Gate("kv", 0.94), Gate("hop", 0.96))
_BOTH = (Gate("kv", 0.88), Gate("hop", 0.88))

FROM_NOTHING = (
    Stage("primer", 128, 1000, _PRIMER, _RANDOM, least=300, single_share=1.0),
    Stage("restate", 64, 800, _RESTATE, _VALUES, least=150, single_share=0.9),
    Stage("questions", 128, 900, _QUESTIONS, _BOTH, single_share=0.7, made_up_share=0.05),
    Stage("length-256", 256, 500, _GROWING, _BOTH, made_up_share=0.1),
    Stage("length-512", 512, 500, _GROWING, _BOTH, made_up_share=0.1),
    Stage("length-1024", 1024, 700, _LONG, made_up_share=0.1, learning_rate=(2e-3, 8e-4)),
    Stage("length-2048", 2048, 500, _LONG, made_up_share=0.1, learning_rate=(8e-4, 5e-5)),
)
"""For random weights."""

CONTINUED = (
    Stage("open-256", 256, 200, _OPENING, _BOTH, made_up_share=0.1, learning_rate=(1.2e-3, 1.2e-3)),
    Stage("open-512", 512, 160, _LONG, _BOTH, made_up_share=0.1, learning_rate=(1.2e-3, 1.2e-3)),
    Stage("open-1024", 1024, 400, _LONG, _SURE, least=200, made_up_share=0.1, learning_rate=(1.2e-3, 8e-4)),
    Stage("open-2048", 2048, 450, _LONG, made_up_share=0.1, learning_rate=(8e-4, 4e-5)),
    Stage("speaking", 1024, 70, _SPEAKING, made_up_share=0.1, learning_rate=(4e-4, 4e-5)),
    Stage("greeting", 1024, 45, _GREETING, made_up_share=0.1, learning_rate=(7e-4, 5e-5)),
)
"""For weights that already look up words of closed lists: opens the word lists, then the length."""

CURRICULA = {"from-nothing": FROM_NOTHING, "continued": CONTINUED}
