"""The values that cross seams: requests, messages, scheduler events, plans. Knows nothing of jax, clocks or sockets.

Everything here is a frozen msgspec struct, so the same bytes serve the socket between API and engine process, the
recorded event stream and its replay.

One file of more than 500 lines, because it is one contract: what goes to an engine, what comes back, what the scheduler
hears and what it says, in this order. Declarations only, and most of them name others of the page: who adds a message
wants to read its neighbours, and a hundred modules import several of these values together.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

import msgspec
from msgspec.structs import force_setattr

PAGE_TOKENS = 64
"""Tokens in a KV page, query tokens in a prefill tile, and the quantization partition along tokens: these three are one
number in an engine, and this one unless `--block-size` says otherwise."""

PAGE_SIZES = (32, 64, 128)
"""What it can be."""

SeqId = int
"""One sequence inside an engine: one choice of one request. Assigned by the engine, never by a client."""


class Frozen(msgspec.Struct, frozen=True, kw_only=True):
    """Base of every value here."""


# Requests


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How to continue a prompt. Field names and meanings are vLLM's.

    `temperature` 0 is greedy. `top_k` 0 or -1 means no limit. `max_tokens` None means up to the model's length. `seed`
    None draws one. `logprobs` is the number of alternatives reported for each sampled token (0: the sampled token only;
    None: nothing); `prompt_logprobs` the same for the prompt. `bad_words` are strings that must not be generated.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] = ()
    banned_token_ids: Sequence[int] = ()
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    ignore_eos: bool = False
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    include_stop_str_in_output: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    detokenize: bool = True

    def __post_init__(self) -> None:
        for name in ("stop", "bad_words"):
            value = getattr(self, name)
            force_setattr(self, name, (value,) if isinstance(value, str) else tuple(value or ()))
        if self.top_k == -1:
            force_setattr(self, "top_k", 0)


class ParamError(ValueError):
    """A parameter that cannot be honoured. `param` is the name a client knows it by."""

    def __init__(self, param: str, message: str):
        super().__init__(message)
        self.param = param


class ModelLimits(Frozen):
    """What a request may ask of a model: host-side checks use these, because XLA clamps bad indices silently."""

    vocab_size: int
    """Width of the logits: a token id is valid below this."""
    max_model_len: int
    max_logprobs: int = 20
    max_choices: int = 128
    max_logit_bias: int = 300
    max_stop_strings: int = 16
    max_stop_token_ids: int = 64
    max_banned_sequences: int = 32
    max_banned_length: int = 8
    eos_token_ids: tuple[int, ...] = ()


class Request(Frozen):
    """One prompt and its `params.n` choices, as it travels to an engine.

    `params` is resolved: `max_tokens`, `seed` set, `bad_words` turned into `banned` token sequences. `salt` separates
    prefix caches (tenants). `id` is unique in the engine and never chosen by a client.

    A *program* is a job whose turns come one after another (an agent, a conversation). Its pages are held from one turn
    to the next, unless this is the `last_turn`; `tool` names what runs in between. `deadline_s`: the seconds after its
    arrival in which the caller wants the answer.
    """

    id: str
    prompt: list[int]
    params: SamplingParams
    banned: tuple[tuple[int, ...], ...] = ()
    priority: int = 0
    tenant: str = ""
    salt: str = ""
    stream: bool = True
    """False: the core may hold tokens back and deliver a choice at its end (offline batches)."""
    program_id: str = ""
    last_turn: bool = False
    tool: str = ""
    deadline_s: float | None = None


def program_key(tenant: str, salt: str, program_id: str) -> str:
    """What a program is called inside an engine: it is its tenant's, and its pages are read only under the salt that
    they were computed for. Empty: no program."""
    return "\0".join((tenant, salt, program_id)) if program_id else ""


# Messages between a front end and an engine core


class Submit(Frozen, tag="submit"):
    request: Request


class SubmitAll(Frozen, tag="submit_all"):
    """Requests that enter together: no step is planned before all of them wait, so a run can repeat bit for bit."""

    requests: tuple[Request, ...]


class Cancel(Frozen, tag="cancel"):
    """Ends requests without a further word; their pages are free at the next step. Unknown ids are ignored."""

    ids: tuple[str, ...]


class Control(Frozen, tag="control"):
    """`verb`: reset_prefix_cache | close_program | drain | shutdown | stats. `program`: the key of the one to close."""

    verb: str
    token: int = 0
    program: str = ""


class PrefixPage(Frozen, array_like=True):
    """One KV page of a sequence: where it belongs, and its record (kv/wire.py): the same bits wherever it goes."""

    group: int
    cls: int
    index: int
    record: bytes


class ExportPrefix(Frozen, tag="export_prefix"):
    """Asks for the cached KV of `tokens`, as far as whole pages of it are cached, under the salt that it was computed
    for. Answered by a `Prefix`."""

    token: int
    tokens: tuple[int, ...]
    salt: str = ""


class ImportPrefix(Frozen, tag="import_prefix"):
    """Brings KV pages of the beginning of `tokens` into the prefix cache. Answered by a `Prefix` without pages."""

    token: int
    tokens: tuple[int, ...]
    pages: tuple[PrefixPage, ...]
    salt: str = ""


ToCore = Submit | SubmitAll | Cancel | Control | ExportPrefix | ImportPrefix


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class TokenLogprobs(Frozen, gc=False):
    """Log-probabilities of one position, of the raw logits. `ids[0]` is the token itself, then the best alternatives in
    falling order; `rank` is the token's own rank among all tokens (1 is the most probable)."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    rank: int


class Delta(Frozen, gc=False):
    """New tokens of one choice. `finish` is set in the last one. Stop strings are the front end's business."""

    id: str
    choice: int
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None = None
    finish: FinishReason | None = None
    stop_token: int | None = None
    cached_tokens: int = 0
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    """Once, with the first tokens of choice 0: one entry a prompt token, None for the first."""
    error: str | None = None
    refused: bool = False
    """With `error`: the engine did not take the request, because of what it asks for."""
    queued_s: float = 0.0
    """Time from arrival to the first step that computed for the request, in the first delta."""


class Deltas(Frozen, tag="deltas"):
    """What one step produced."""

    deltas: tuple[Delta, ...]


class Ready(Frozen, tag="ready"):
    """First message of a core: what it serves."""

    limits: ModelLimits
    num_pages: tuple[int, ...]
    page_tokens: int
    max_num_seqs: int
    startup_s: float
    page_classes: tuple[PageClasses, ...] = ()
    """What the KV cache is made of, by group."""


class Stats(Frozen, tag="stats"):
    """Counters since start and gauges of now, by metric name without prefix (see server/metrics.py)."""

    counters: dict[str, float]
    gauges: dict[str, float]
    token: int = 0


class Prefix(Frozen, tag="prefix"):
    """Answers a message with the same `token`: `count` leading tokens are in the prefix cache now. `error`: why nothing
    was exported or imported."""

    token: int
    count: int = 0
    pages: tuple[PrefixPage, ...] = ()
    error: str | None = None


class Failed(Frozen, tag="failed"):
    """Last message of a core that cannot go on. `refused`: it never started, because of what it was asked to do."""

    cause: str
    refused: bool = False


FromCore = Deltas | Ready | Stats | Prefix | Failed


# KV page accounting


class KVGroup(Frozen):
    """Layers whose KV shares pools, page ids and block tables. `window` None: a page lives as long as its sequence;
    n: a query at position p reads (p - n, p], pages behind are freed."""

    layers: tuple[int, ...]
    kv_heads: int
    head_dim: int
    window: int | None = None
    page_tokens: int = PAGE_TOKENS


class PageClass(Frozen):
    """A kind of page with a pool of its own. `pages`: how many the pool has; `bytes`: of one page, all layers."""

    name: str
    pages: int
    bytes: int


class PageClasses(Frozen):
    """What the scheduler knows of a group's KV format. One class: written at once. Two: 16-bit pages first, sealed
    pages second, with `sink_pages` at the front and `residual_pages` at the end that stay in the first class."""

    classes: tuple[PageClass, ...]
    window: int | None = None
    sink_pages: int = 0
    residual_pages: int = 0
    page_tokens: int = PAGE_TOKENS


# Scheduler events: its only input


class Arrive(Frozen, tag="arrive"):
    """A sequence wants to run. `hashes`: chain hash of each full prompt page (empty: no prefix caching for it).

    `parent`: another choice of the same request; the sequence may share the parent's prompt pages once they are
    computed. `max_new`: upper bound of tokens to generate. `whole_prompt`: every prompt token must be computed (prompt
    log-probs), so no prefix is taken from the cache.

    `program`: key of the program whose turn it is. `shared`: leading tokens that the prompt has in common with the
    sequence pinned for that program (`Scheduler.pinned`). `deadline`: when the caller wants it finished. `output`: its
    true length in tokens, which only simulations know.
    """

    now: float
    seq: SeqId
    prompt: int
    max_new: int
    hashes: tuple[bytes, ...] = ()
    parent: SeqId | None = None
    priority: int = 0
    tenant: str = ""
    whole_prompt: bool = False
    program: str = ""
    last_turn: bool = False
    tool: str = ""
    shared: int = 0
    deadline: float | None = None
    output: int | None = None


class Abort(Frozen, tag="abort"):
    now: float
    seq: SeqId


class SeqResult(Frozen, array_like=True, gc=False):
    """What a step gave a sampling row: `tokens` really appended (0 when the row ran past its end), whether the sequence
    ends with them, and the chain hashes of pages that became full of known tokens. They go on where the hashes before
    them ended: the j-th hash ever given for a sequence, from `Arrive.hashes` on, names its page j."""

    seq: SeqId
    tokens: int
    finished: bool
    hashes: tuple[bytes, ...] = ()


class StepDone(Frozen, tag="step_done"):
    now: float
    step: int
    duration: float
    results: tuple[SeqResult, ...]


class MoveDone(Frozen, tag="move_done"):
    now: float
    move: int


class Tick(Frozen, tag="tick"):
    now: float


class CostUpdate(Frozen, tag="cost"):
    """Parameters of the cost model that policies see."""

    now: float
    values: dict[str, float]


class ResetCache(Frozen, tag="reset_cache"):
    """Forget every unreferenced cached page and what is held for programs (new weights, or on request)."""

    now: float


class CloseProgram(Frozen, tag="close_program"):
    """The program has no further turns: what is held for it is let go."""

    now: float
    program: str


class PagesCame(Frozen, tag="pages_came"):
    """Pages from elsewhere wait for places in the prefix cache. `pages`: group, class and index of each; `hashes`: the
    chain hashes of the sequence's leading pages, which name them. The next plan says where they go."""

    now: float
    id: int
    hashes: tuple[bytes, ...]
    pages: tuple[tuple[int, int, int], ...]


Event = Arrive | Abort | StepDone | MoveDone | Tick | CostUpdate | ResetCache | CloseProgram | PagesCame


# Plans: the scheduler's only output


class Admit(Frozen, array_like=True, gc=False):
    """`seq` takes `slot`; the runner uploads its known tokens and parameters there before the step. `cached`: leading
    tokens whose KV is already in the pages granted with it."""

    seq: SeqId
    slot: int
    cached: int


class Work(Frozen, array_like=True, gc=False):
    """One sequence's share of a step: compute tokens [start, start + count) of its sequence."""

    seq: SeqId
    slot: int
    start: int
    """Upper bound for a decode row: the slot's length is the truth."""
    count: int
    """q for a decode row; at most a page, within one page, for a prefill tile."""
    samples: bool
    """The last token's logits go to `head`."""


class Grant(Frozen, array_like=True, gc=False):
    """Entry `index` of the block table of (`slot`, `group`) becomes `page` of class `cls`."""

    slot: int
    group: int
    index: int
    cls: int
    page: int


class Copy(Frozen, array_like=True, gc=False):
    """Page `src` is copied to page `dst` before the step (fork of a partly filled page)."""

    group: int
    cls: int
    src: int
    dst: int


class Seal(Frozen, array_like=True, gc=False):
    """16-bit page `src` of `group` is quantized to sealed page `dst` after the step."""

    group: int
    slot: int
    index: int
    src: int
    dst: int


class PageUpdates(Frozen):
    """Pages granted, copied, sealed and freed in this step, by group and class."""

    grants: tuple[Grant, ...] = ()
    copies: tuple[Copy, ...] = ()
    seals: tuple[Seal, ...] = ()
    freed: int = 0


class Move(Frozen, array_like=True):
    """Pages on their way between tiers. `kind`: out | in. Reserved until MoveDone names `id`."""

    id: int
    kind: str
    group: int
    cls: int
    pages: tuple[int, ...]
    host: tuple[int, ...]


class Landing(Frozen, array_like=True):
    """Where pages of a `PagesCame` go: `pages` holds their number there, group, class and page. `fits`: False if there
    was no room, and then none of them is taken."""

    id: int
    fits: bool
    pages: tuple[tuple[int, int, int, int], ...] = ()


class Plan(Frozen):
    """What one step does. The runner executes it, the simulator prices it, followers replay it.

    Order of effects: `moves` out, `landings`, `pages.copies`, `admits` and `pages.grants`, then the forward of `decode`
    rows and `prefill` tiles (a tile's pages were granted by now), then `head` for the rows that sample, then seals.
    `preempted` sequences lost their slot and pages before the step; they come back with an Admit.
    """

    step: int
    decode: tuple[Work, ...] = ()
    prefill: tuple[Work, ...] = ()
    admits: tuple[Admit, ...] = ()
    preempted: tuple[SeqId, ...] = ()
    pages: PageUpdates = PageUpdates()
    moves: tuple[Move, ...] = ()
    landings: tuple[Landing, ...] = ()

    @property
    def has_work(self) -> bool:
        return bool(self.decode or self.prefill)


# What a library user gets back


class CompletionOutput(msgspec.Struct, kw_only=True):
    """One choice. Field names as vLLM's."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def finished(self) -> bool:
        return self.finish_reason is not None


class RequestOutput(msgspec.Struct, kw_only=True):
    """A prompt and its choices. Field names as vLLM's; `metrics` holds arrival, first token and finish times (s)."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    num_cached_tokens: int = 0
    metrics: dict[str, float] = {}
    error: str | None = None


class CachedPrefix(Frozen):
    """KV of the leading `tokens` of a prompt, whole pages of it, as an engine computed it. Any engine of the same model
    and KV options takes it; the bytes are for a file or a socket."""

    tokens: tuple[int, ...]
    pages: tuple[PrefixPage, ...]

    def to_bytes(self) -> bytes:
        return msgspec.msgpack.encode(self)

    @classmethod
    def from_bytes(cls, data: bytes) -> CachedPrefix:
        """
        Raises:
            ValueError: not what `to_bytes` made. That the pages are whole is seen when they are imported.
        """
        return msgspec.msgpack.decode(data, type=cls)
