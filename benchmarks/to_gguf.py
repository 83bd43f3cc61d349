"""Writes a Hugging Face folder as an f32 GGUF file for llama.cpp: Llama and Qwen3 layouts, BPE tokenizers.

    python benchmarks/to_gguf.py FOLDER OUT.gguf

For the peer runs of peers.py, which send token ids: added tokens keep their ids and merges their ranks, but the
pre-tokenizer is llama.cpp's `default`, so texts that it splits otherwise would get other tokens.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np

ARCHITECTURES = {"LlamaForCausalLM": "llama", "Qwen3ForCausalLM": "qwen3"}

OUTSIDE_LAYERS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
IN_LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def convert(folder: Path, out: Path) -> None:
    """
    Raises:
        ValueError: an architecture, a rope scaling or a tokenizer that this converter does not know.
    """
    config = json.loads((folder / "config.json").read_text())
    architecture = ARCHITECTURES.get(config["architectures"][0])
    if architecture is None or config.get("rope_scaling"):
        raise ValueError(f"{folder}: only {', '.join(ARCHITECTURES)} without rope scaling can be written")
    writer = gguf.GGUFWriter(out, architecture)
    _write_shape(writer, config)
    _write_tokenizer(writer, json.loads((folder / "tokenizer.json").read_text()), config)
    for name, tensor in read_tensors(folder):
        if name == "lm_head.weight" and config.get("tie_word_embeddings"):
            continue
        if architecture == "llama":
            tensor = _rope_order(name, tensor, config)
        writer.add_tensor(_renamed(name), np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_shape(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    theta = config.get("rope_theta") or config.get("rope_parameters", {}).get("rope_theta", 10000.0)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(theta)


def _write_tokenizer(writer: gguf.GGUFWriter, tokenizer: dict[str, Any], config: dict[str, Any]) -> None:
    model = tokenizer["model"]
    if model["type"] != "BPE":
        raise ValueError(f"a tokenizer of type {model['type']} cannot be written; only BPE")
    names = {i: text for text, i in model["vocab"].items()} | {t["id"]: t["content"] for t in tokenizer["added_tokens"]}
    special = {t["id"] for t in tokenizer["added_tokens"]}
    width = config["vocab_size"]
    tokens = [names.get(i, f"[unused {i}]") for i in range(width)]
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    kinds = [_kind(i, tokens[i], i in names, i in special) for i in range(width)]
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    if model.get("byte_fallback"):
        # A sentencepiece-like BPE: the score is the merge's rank, or text would be cut otherwise than by merges.
        ranks: dict[str, int] = {}
        for rank, merge in enumerate(merges):
            ranks.setdefault(merge.replace(" ", ""), rank)
        writer.add_tokenizer_model("llama")
        writer.add_token_scores([float(-ranks.get(token, 10**6)) for token in tokens])
        writer.add_unk_token_id(0)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_merges(merges)
    eos = config["eos_token_id"]
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(eos[0] if isinstance(eos, list) else eos)
    writer.add_add_bos_token(False)


def _kind(index: int, token: str, known: bool, special: bool) -> gguf.TokenType:
    if not known:
        return gguf.TokenType.UNUSED
    if token == "<unk>":
        return gguf.TokenType.UNKNOWN
    if special:
        return gguf.TokenType.CONTROL
    return gguf.TokenType.BYTE if re.fullmatch("<0x[0-9A-F]{2}>", token) else gguf.TokenType.NORMAL


def read_tensors(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of the folder's safetensors files as float32."""
    for path in sorted(folder.glob("*.safetensors")):
        data = np.memmap(path, np.uint8, "r")
        start = 8 + int.from_bytes(data[:8].tobytes(), "little")
        header = json.loads(data[8:start].tobytes())
        header.pop("__metadata__", None)
        for name, entry in header.items():
            low, high = entry["data_offsets"]
            yield name, _as_float32(data[start + low : start + high], entry["dtype"]).reshape(entry["shape"])


def _as_float32(raw: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "F32":
        return raw.view(np.float32)
    if dtype == "F16":
        return raw.view(np.float16).astype(np.float32)
    if dtype == "BF16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    raise ValueError(f"tensors of type {dtype} cannot be written")


def _rope_order(name: str, tensor: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    """Rows of q and k from Hugging Face's halves to the interleaved pairs of llama.cpp's `llama` architecture."""
    if name.endswith("q_proj.weight"):
        heads = config["num_attention_heads"]
    elif name.endswith("k_proj.weight"):
        heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    else:
        return tensor
    rows = tensor.shape[0]
    return tensor.reshape(heads, 2, rows // heads // 2, -1).swapaxes(1, 2).reshape(tensor.shape)


def _renamed(name: str) -> str:
    stem = name.removesuffix(".weight")
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem)
    return (f"blk.{layer[1]}.{IN_LAYER[layer[2]]}" if layer else OUTSIDE_LAYERS[stem]) + ".weight"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path, metavar="OUT.gguf")
    args = parser.parse_args()
    convert(args.folder, args.out)
