"""The one definition of every option: CLI flags, YAML keys, server options and reference docs derive from it. No jax.

A part is a frozen dataclass; `option(...)` gives a field its help, its parser and its choices. `EngineConfig` is what
an engine needs; `ServeConfig` adds HTTP. Spelling follows vLLM where vLLM has the option.

One file of more than 500 lines, nearly all of them options and their help: whoever adds one wants to see what there is,
and the parsers below know the options only by what `option(...)` says of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


class ConfigError(ValueError):
    """An option that does not exist or whose value cannot be honoured."""


def option(
    default: Any,
    help: str,
    *,
    choices: Sequence[Any] | None = None,
    parse: Callable[[str], Any] | None = None,
    low: float | None = None,
    high: float | None = None,
    cli: bool = True,
    pairs: bool = False,
) -> Any:
    """A config field. `parse` reads the text of a flag; `low`/`high` bound a number; `cli` False keeps it to YAML.
    `pairs`: the items are KEY=VALUE, and in YAML the option may be a mapping."""
    known = {"help": help, "choices": choices, "parse": parse, "low": low, "high": high, "cli": cli, "pairs": pairs}
    return field(default=default, metadata=known)


_SIZES = {
    "": 1,
    "k": 1000,
    "m": 1000**2,
    "g": 1000**3,
    "t": 1000**4,
    "K": 1024,
    "M": 1024**2,
    "G": 1024**3,
    "T": 1024**4,
}


def human_int(text: str | int) -> int:
    """`32K` is 32768, `32k` is 32000, `1.5G`, `256MiB`; a plain number is itself."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgtKMGT]?)(iB|B)?", str(text).strip())
    if not match:
        raise ConfigError(f"{text!r} is not a number such as 4096, 32K (32768), 32k (32000) or 256MiB")
    return int(float(match[1]) * _SIZES[match[2]])


@dataclass(frozen=True)
class ModelOptions:
    model: str | None = option(
        None,
        "Folder in Hugging Face layout, a folder made by `jaxserve convert`, or a hub id. "
        "Without it: the bundled model.",
    )
    revision: str | None = option(None, "Branch, tag or commit of a hub id.")
    tokenizer: str | None = option(None, "Folder or hub id of the tokenizer, when it is not the model's.")
    served_model_name: tuple[str, ...] = option((), "Names that clients may use; the first is the one reported.")
    dtype: str = option(
        "auto",
        "Type of weights and activations. auto: the checkpoint's on a GPU, float32 on a CPU "
        "(XLA's bfloat16 is slower there).",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    quantization: str | None = option(None, "Quantize the weights while loading.", choices=("int8",))
    max_model_len: int | None = option(
        None, "Longest sequence, prompt and answer together. Default: the model's own.", parse=human_int, low=1
    )
    seed: int = option(0, "Seeds requests that bring no seed of their own.")
    chat_template: str | None = option(None, "File with a Jinja chat template, instead of the tokenizer's.")
    generation_config: str = option(
        "auto",
        "auto: defaults for sampling come from the model's generation_config.json; none: jaxserve's own.",
        choices=("auto", "none"),
    )


_PACKED = ("kivi2", "kivi4", "hack2", "hack4", "hack8", "hack2_p", "hack4_p", "hack8_p")


@dataclass(frozen=True)
class CacheOptions:
    kv_cache_dtype: str = option(
        "auto",
        "Format of the KV cache. auto: the type of the activations on a GPU, f16 on a CPU; int8 and fp8_e4m3 (fp8): "
        "8 bits with a scale for each token and head; kivi and hack with 2, 4 or 8 bits: full pages are sealed, "
        "docs/techniques/kivi.md and hack.md; zeroc: sealed pages hold the channels that a calibration chose, in "
        "16 bits or packed (docs/techniques/zeroc.md).",
        choices=(
            *("auto", "bf16", "f16", "f32", "fp8", "fp8_e4m3", "int8"),
            *_PACKED,
            *("zeroc", *(f"zeroc+{name}" for name in _PACKED)),
        ),
    )
    kv_calibration: str | None = option(
        None, "File that `jaxserve calibrate` wrote for this model, for --kv-cache-dtype zeroc."
    )
    kv_cache_dtype_layers: tuple[str, ...] = option(
        (),
        "Layers whose KV has another format, as FORMAT=LAYERS: `--kv-cache-dtype-layers bf16=0,1,-1 int8=8-11`. Layers "
        "are numbers (-1: the last), ranges, `sliding_window` or `full_attention`. In YAML: a mapping.",
        pairs=True,
    )
    block_size: int = option(
        64,
        "Tokens of a KV page and of a prefill tile. 64 fits the kernels best. Smaller pages leave less of the last one "
        "empty and more of a prompt to be found again; larger ones need fewer scales in sealed pages, whose 16-bit "
        "pages are then longer too (docs/techniques/page-size.md).",
        choices=(32, 64, 128),
    )
    gpu_memory_utilization: float = option(0.9, "Share of the GPU's memory that the engine may use.", low=0.05, high=1)
    kv_cache_memory: int | None = option(
        None, "Bytes for the KV cache, instead of what is free. Default on a CPU: 256MiB.", parse=human_int, low=1
    )
    kv_sink_pages: int | None = option(
        None,
        "Pages at the front that formats with sealed pages keep in 16 bits. Default: 1.",
        low=0,
        high=16,
    )
    kv_residual_pages: int | None = option(
        None,
        "Pages up to the newest token that formats with sealed pages read in 16 bits. Default: 1.",
        low=1,
        high=2,
    )
    kv_quant_group: int | None = option(
        None,
        "Channels that share a scale where kivi and hack quantize by token (values; in form P keys). 32 loses less for "
        "half a bit more a value (docs/techniques/kivi.md). Default: 64.",
        choices=(32, 64),
    )
    kv_key_rotation: str = option(
        "auto",
        "How 8-bit formats and those with sealed pages turn keys before they are quantized. hadamard: by a fixed "
        "orthogonal matrix, which spreads what is large in a few channels over all of them; queries are turned alike, "
        "so no score changes but by less rounding (docs/techniques/key-rotation.md). Refused for fp8_e4m3 where the "
        "checkpoint brings KV scales. none: keys as they are. auto: hadamard for kivi4, kivi2, hack4 and hack2.",
        choices=("auto", "none", "hadamard"),
    )
    kv_expected_len: int | None = option(
        None,
        "Tokens of a usual sequence, prompt and answer: memory is split between 16-bit and sealed pages, and between "
        "full and windowed layers, as such sequences use it. Default: a quarter of max_model_len.",
        parse=human_int,
        low=1,
    )
    prefill_exact: bool = option(
        False,
        "With sealed pages: a prefill chunk attends to itself in 16 bits. Closer to dense KV, but results then depend "
        "on where chunks begin; not with --batch-invariant.",
    )
    swap_space: int = option(
        0,
        "Bytes of host memory for the KV of sequences that lost their place. 0: it is computed again.",
        parse=human_int,
        low=0,
    )
    kv_transfer: bool = option(
        False,
        "Let front ends export the cached KV of a prompt's beginning, and import what another engine with the same "
        "model and options exported.",
    )
    host_link_gbps: float | None = option(
        None,
        "Gigabits a second between device and host: what fetching is expected to take, and no copy goes faster. "
        "Default: 192 expected (PCIe 4.0), no limit.",
        low=0.001,
    )
    enable_prefix_caching: bool = option(True, "Reuse the KV of prompt beginnings seen before.")


@dataclass(frozen=True)
class SchedulerOptions:
    scheduling_policy: str = option(
        "sarathi",
        "Who computes next: sarathi (chunked prefill beside decodes), fcfs (prefill first), static (request-level "
        "batches), priority (by the request's `priority`, lower first), fairness (equal shares for tenants), mlfq "
        "(short jobs first, without knowing which are short), auto (sarathi or mlfq, by how the lengths of answers "
        "spread), urgency (by `deadline_s`), continuum (agents: programs in order, pins for as long as tools take), "
        "batchllm (offline: requests that share a prefix together), srpt (a bound for simulations); slora+NAME admits "
        "only what will fit to its end, prepacking+NAME fills tile buckets. "
        "docs/techniques has a page on each.",
    )
    scheduling_params: tuple[str, ...] = option(
        (),
        "Parameters of the policy as KEY=VALUE, as its page names them: `--scheduling-params levels=8 ratio=2`. In "
        "YAML: a mapping.",
        pairs=True,
    )
    max_num_seqs: int | None = option(
        None, "Sequences running at once. Default: 256 on a GPU, 32 on a CPU.", parse=human_int, low=1, high=4096
    )
    max_num_batched_tokens: int | None = option(
        None, "Token budget of a step. Default: 2048 on a GPU, 512 on a CPU.", parse=human_int, low=1
    )
    max_queued_requests: int = option(
        2048, "Requests that may wait; more are refused with 503.", parse=human_int, low=1
    )
    program_share: float = option(
        0.5,
        "Share of the KV cache that programs (requests with a `program_id`) may hold between their turns.",
        low=0,
        high=1,
    )
    program_ttl: float = option(
        60.0,
        "Seconds for which a program holds its pages after a turn. Afterwards they stay as long as nobody needs them.",
        low=0,
    )


@dataclass(frozen=True)
class ParallelOptions:
    tensor_parallel_size: int = option(1, "GPUs that share each layer.", low=1)


@dataclass(frozen=True)
class SpeculativeOptions:
    speculative_method: str | None = option(
        None,
        "Propose tokens and verify several at once. ngram: look them up in the sequence's own text.",
        choices=("ngram",),
    )
    num_speculative_tokens: int = option(4, "Tokens proposed per step.", low=1, high=15)
    prompt_lookup_max: int = option(3, "Longest n-gram to look up.", low=1, high=8)
    prompt_lookup_min: int = option(1, "Shortest n-gram to look up.", low=1, high=8)


@dataclass(frozen=True)
class RuntimeOptions:
    device: str = option("auto", "Where to run.", choices=("auto", "cpu", "cuda"))
    attention_backend: str = option(
        "auto",
        "Attention kernels. auto: triton on a GPU, native on a CPU; native: compiled by the machine's C compiler, "
        "reference without one and for odd sizes; mosaic: Hopper's own instructions where they apply (dense 16-bit KV, "
        "head_dim 64 or 128), triton elsewhere; cudnn: NVIDIA's library where a prefill chunk reads itself (dense "
        "16-bit KV, layers without a window), triton elsewhere.",
        choices=("auto", "reference", "native", "triton", "mosaic", "cudnn"),
    )
    batch_invariant: bool = option(False, "Same bits for a request whatever shares its batch, at some cost in speed.")
    wait_for_buckets: bool = option(
        False, "Compile every program before the first request instead of in the background."
    )
    decode_buckets: tuple[int, ...] = option(
        (), "Numbers of decode rows to compile for. Default: 1, 4, 16, ... up to max_num_seqs."
    )
    tile_buckets: tuple[int, ...] = option(
        (),
        "Numbers of prefill tiles, of --block-size tokens each, to compile for. Default: 1, 2, 4, ... up to the token "
        "budget.",
    )
    compile_cache: str | None = option(None, "Folder for compiled programs. Default: ~/.cache/jaxserve. none: off.")
    record: str | None = option(None, "File to record scheduler events and plans in, for replay.")


@dataclass(frozen=True)
class EngineConfig:
    """Everything an engine needs. Parts are grouped by who reads them; keys are unique across parts."""

    model: ModelOptions = ModelOptions()
    cache: CacheOptions = CacheOptions()
    scheduler: SchedulerOptions = SchedulerOptions()
    parallel: ParallelOptions = ParallelOptions()
    speculative: SpeculativeOptions = SpeculativeOptions()
    runtime: RuntimeOptions = RuntimeOptions()

    @classmethod
    def of(cls, **options: Any) -> EngineConfig:
        """From flat keywords: `EngineConfig.of(model="folder", max_num_seqs=16)`."""
        return build(cls, options)


@dataclass(frozen=True)
class ServerOptions:
    host: str = option("127.0.0.1", "Address to listen on.")
    port: int = option(8000, "Port to listen on.", low=0, high=65535)
    uds: str | None = option(None, "Listen on this Unix socket instead of a port.")
    api_key: tuple[str, ...] = option((), "Keys that clients must present as `Authorization: Bearer KEY`.")
    admin_api_key: str | None = option(None, "Key for the admin routes; without it they answer to loopback only.")
    root_path: str = option("", "Path prefix under which a proxy serves us.")
    allowed_origins: tuple[str, ...] = option((), "CORS origins.")
    metrics_compat: str | None = option(None, "Also export metrics under this system's prefix.", choices=("vllm",))
    max_body_bytes: int = option(32 * 1024**2, "Largest request body.", parse=human_int, low=1024)
    drain_timeout: float = option(30.0, "Seconds that running requests get to finish after SIGTERM.", low=0)
    log_level: str = option("info", "How much to say.", choices=("debug", "info", "warning", "error"))


@dataclass(frozen=True)
class ServeConfig:
    """An engine and its HTTP face."""

    engine: EngineConfig = EngineConfig()
    server: ServerOptions = ServerOptions()


def fields_of(config: type) -> dict[str, tuple[tuple[str, ...], dataclasses.Field]]:
    """Every option of a (nested) config class by its flat name, with the path of parts that leads to it."""
    found: dict[str, tuple[tuple[str, ...], dataclasses.Field]] = {}
    hints = typing.get_type_hints(config)
    for f in dataclasses.fields(config):
        if dataclasses.is_dataclass(hints[f.name]):
            for name, (path, leaf) in fields_of(hints[f.name]).items():
                found[name] = ((f.name, *path), leaf)
        else:
            found[f.name] = ((), f)
    return found


def build(config: type[T], options: Mapping[str, Any]) -> T:
    """Makes a config from flat options (keys as in YAML; dashes and underscores are the same).

    Raises:
        ConfigError: an unknown key, a value of the wrong type, outside its choices or bounds.
    """
    known = fields_of(config)
    given = {key.replace("-", "_"): value for key, value in options.items()}
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ConfigError(f"unknown option {unknown[0]!r}{_nearest(unknown[0], known)}")
    values = {name: checked(config, name, value) for name, value in given.items()}
    return typing.cast(T, _assemble(config, values))


def _assemble(config: type, values: Mapping[str, Any]) -> Any:
    hints = typing.get_type_hints(config)
    parts: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        if dataclasses.is_dataclass(hints[f.name]):
            parts[f.name] = _assemble(typing.cast(type, hints[f.name]), values)
        elif f.name in values:
            parts[f.name] = values[f.name]
    return config(**parts)


def _nearest(name: str, known: Mapping[str, Any]) -> str:
    import difflib

    close = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _leaf_type(config: type, name: str) -> Any:
    path, leaf = fields_of(config)[name]
    owner: Any = config
    for part in path:
        owner = typing.get_type_hints(owner)[part]
    return typing.get_type_hints(owner)[leaf.name]


def _unwrap(kind: Any) -> tuple[Any, bool, bool]:
    """(element type, may be None, is a list) of an option's annotation."""
    optional = False
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        args = [a for a in typing.get_args(kind) if a is not type(None)]
        optional, kind = True, args[0]
    if typing.get_origin(kind) is tuple:
        return typing.get_args(kind)[0], optional, True
    return kind, optional, False


def checked(config: type, name: str, value: Any) -> Any:
    """`value` as the option's type.

    Raises:
        ConfigError: naming the option, the value and what is allowed.
    """
    meta = fields_of(config)[name][1].metadata
    kind, optional, many = _unwrap(_leaf_type(config, name))
    flag = "--" + name.replace("_", "-")
    if value is None:
        if optional:
            return None
        raise ConfigError(f"{flag} needs a value")
    if isinstance(value, Mapping) and not meta["pairs"]:
        raise ConfigError(f"{flag} takes no mapping, but was given {dict(value)!r}")
    if many:
        items = (
            _pairs(value) if isinstance(value, Mapping) else [value] if isinstance(value, str | int) else list(value)
        )
        return tuple(_scalar(flag, kind, meta, item) for item in items)
    return _scalar(flag, kind, meta, value)


def _pairs(mapping: Mapping[Any, Any]) -> list[str]:
    """`{bf16: [0, -1], levels: 8, on: true}` as KEY=VALUE: bf16=0,-1 levels=8 on=true."""

    def text(value: Any) -> str:
        if isinstance(value, list | tuple):
            return ",".join(map(text, value))
        return value if isinstance(value, str) else json.dumps(value, default=str)

    return [f"{key}={text(value)}" for key, value in mapping.items()]


def _scalar(flag: str, kind: Any, meta: Mapping[str, Any], value: Any) -> Any:
    try:
        if meta["parse"] is not None:
            value = meta["parse"](value)
        elif kind is bool:
            if not isinstance(value, bool):
                raise ValueError("true or false")
        elif kind is int:
            if isinstance(value, bool) or int(value) != float(value):
                raise ValueError("a whole number")
            value = int(value)
        elif kind is float:
            value = float(value)
        elif not isinstance(value, str):
            raise ValueError("text")
    except ConfigError as error:
        raise ConfigError(f"{flag}: {error}") from None
    except (TypeError, ValueError):
        raise ConfigError(f"{flag} {value!r} is not a valid {kind.__name__}") from None
    if meta["choices"] is not None and value not in meta["choices"]:
        raise ConfigError(f"{flag} {value!r} is not one of {', '.join(map(str, meta['choices']))}")
    if (meta["low"] is not None and value < meta["low"]) or (meta["high"] is not None and value > meta["high"]):
        bounds = f"at least {meta['low']}" if meta["high"] is None else f"between {meta['low']} and {meta['high']}"
        raise ConfigError(f"{flag} {value} must be {bounds}")
    return value


def add_arguments(parser: argparse.ArgumentParser, config: type) -> None:
    """Adds a flag for every option of `config`, and `--config FILE.yaml`. Flags win over the file."""
    parser.add_argument("--config", metavar="FILE.yaml", help="Read options from this file; flags win over it.")
    groups: dict[str, Any] = {}
    for name, (path, leaf) in fields_of(config).items():
        if not leaf.metadata["cli"]:
            continue
        title = path[-1] if path else config.__name__
        group = groups.setdefault(title, parser.add_argument_group(title))
        kind, _, many = _unwrap(_leaf_type(config, name))
        text = leaf.metadata["help"] + _default_text(leaf)
        flag = "--" + name.replace("_", "-")
        if kind is bool:
            group.add_argument(
                flag,
                dest=name,
                action=argparse.BooleanOptionalAction,
                default=argparse.SUPPRESS,
                help=text.replace("%", "%%"),
            )
        else:
            metavar = (
                "{" + ",".join(map(str, leaf.metadata["choices"])) + "}"
                if leaf.metadata["choices"]
                else kind.__name__.upper()
            )
            group.add_argument(
                flag,
                dest=name,
                default=argparse.SUPPRESS,
                nargs="+" if many else None,
                metavar=metavar,
                help=text.replace("%", "%%"),
            )


def _default_text(leaf: dataclasses.Field) -> str:
    default = leaf.default
    if default is None or default == () or default == "" or "Default" in leaf.metadata["help"]:
        return ""
    return f" Default: {default}."


def from_arguments(config: type[T], args: argparse.Namespace) -> T:
    """The config that parsed arguments describe: `--config` file first, then flags.

    Raises:
        ConfigError: as `build`; also for a file that cannot be read or parsed.
    """
    options = dict(read_yaml(args.config)) if getattr(args, "config", None) else {}
    known = fields_of(config)
    options.update({name: value for name, value in vars(args).items() if name in known})
    return build(config, options)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A flat mapping of options from a YAML file.

    Raises:
        ConfigError: a file that cannot be read, is not YAML, holds something else or an option twice.
    """
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
        node, data = yaml.compose(text, Loader=yaml.SafeLoader), yaml.safe_load(text) or {}
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"--config {path} is not UTF-8 text") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"--config {path} must hold `option: value` lines")
    # YAML itself takes the last of two values in silence.
    names = [str(key.value).replace("-", "_") for key, _ in node.value] if node is not None else []
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"--config {path} gives {twice} twice")
    return {str(key).replace("-", "_"): value for key, value in data.items()}
