"""The stages of training as data: what is mixed, how long rows are, and which recall a stage must reach to end. Runs nothing.

Why this order: long random repeats make induction form; retelling facts in short rows is the densest supervision of key matching
and starts the second circuit, which questions alone do not; after that each doubling of length is cheap.
"""
from collections.abc import Mapping
from dataclasses import dataclass, field

TOKENS_PER_STEP = 2048


@dataclass(frozen=True)
class Gate:
    """`task` evaluated on fresh rows of the stage's length must reach `share`, counted by answer tokens or by whole answers."""
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


CURRICULUM = (
    Stage("primer", 128, 1000, {"rand": .25, "copy": .15, "kv": .40, "hop": .10, "needle": .05, "var": .05},
          (Gate("rand", .85, whole=False),), least=300, single_share=1.0),
    Stage("restate", 64, 800, {"restate": .55, "kv": .20, "hop": .08, "needle": .05, "copy": .05, "text": .07},
          (Gate("restate", .80, whole=False),), least=150, single_share=.9),
    Stage("questions", 128, 900, {"restate": .25, "kv": .32, "hop": .15, "needle": .10, "var": .03, "copy": .03, "text": .08, "talk": .02,
                                  "dialogue": .02},
          (Gate("kv", .88), Gate("hop", .85)), single_share=.7, made_up_share=.05),
    Stage("length-256", 256, 500, {"restate": .12, "kv": .24, "hop": .20, "needle": .12, "var": .03, "copy": .03, "talk": .04,
                                   "dialogue": .08, "text": .14},
          (Gate("kv", .88), Gate("hop", .88)), made_up_share=.1),
    Stage("length-512", 512, 500, {"restate": .10, "kv": .24, "hop": .16, "needle": .14, "var": .03, "copy": .03, "talk": .04,
                                   "dialogue": .10, "text": .16},
          (Gate("kv", .88), Gate("hop", .88)), made_up_share=.1),
    Stage("length-1024", 1024, 700, {"restate": .08, "kv": .24, "hop": .14, "needle": .14, "var": .03, "copy": .03, "talk": .04,
                                     "dialogue": .12, "text": .18}, (), made_up_share=.1, learning_rate=(2e-3, 8e-4)),
    Stage("length-2048", 2048, 500, {"restate": .05, "kv": .26, "hop": .14, "needle": .14, "var": .03, "copy": .03, "talk": .04,
                                     "dialogue": .12, "text": .19}, (), made_up_share=.1, learning_rate=(8e-4, 5e-5)),
)

_LONG = {"restate": .08, "kv": .27, "hop": .14, "needle": .13, "var": .03, "copy": .03, "talk": .05, "dialogue": .11, "text": .16}
CONTINUED = (
    Stage("open-256", 256, 200, {"restate": .15, "kv": .33, "hop": .14, "needle": .08, "var": .03, "copy": .04, "talk": .05, "dialogue": .08,
                                 "text": .10}, (Gate("kv", .90), Gate("hop", .90)), made_up_share=.1, learning_rate=(1.2e-3, 1.2e-3)),
    Stage("open-512", 512, 160, _LONG, (Gate("kv", .90), Gate("hop", .90)), least=100, made_up_share=.1, learning_rate=(1.2e-3, 1.2e-3)),
    Stage("open-1024", 1024, 220, _LONG, (Gate("kv", .92), Gate("hop", .92)), least=150, made_up_share=.1, learning_rate=(1.2e-3, 8e-4)),
    Stage("open-2048", 2048, 260, _LONG, (), made_up_share=.1, learning_rate=(8e-4, 4e-5)),
)
"""For a model that already looks up words of closed lists (`--init`): opens the words, then the length."""

CURRICULA = {"scratch": CURRICULUM, "continued": CONTINUED}
