"""Small tokenizers of every kind that models come with, made here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import settings
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from jaxserve.text.tokenizer import Tokenizer

# Machines that run other things meanwhile must not fail a test over its time.
settings.register_profile("text", deadline=None)
settings.load_profile("text")

TEXT = [
    "Once upon a time there was a little girl named Lily.",
    "She loved the café, naïve 世界 and 👍🏽 emoji.",
    "def f(x):\n    return x + 1\n",
    "Ünïcödé wörds — and 12345 numbers… don't stop",
]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_level() -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(
            vocab_size=400,
            show_progress=False,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    backend.add_tokens([AddedToken("<tool call>", special=False), AddedToken("ünder", special=False)])
    return backend


def byte_fallback(strip: bool = True) -> Backend:
    """As converters write SentencePiece models: Llama 2 with `strip`, Gemma without."""
    characters = sorted(set("".join(TEXT[0])) - {" "})
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *characters,
        "▁o",
        "▁t",
        "he",
        "▁the",
        "▁▁",
    ]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    merges = [("▁", "o"), ("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "▁")]
    backend = Backend(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    prepend = [normalizers.Prepend("▁")] if strip else []
    backend.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if strip else [])])
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


def metaspace() -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=120, show_progress=False, special_tokens=SPECIAL))
    return backend


def words() -> Backend:
    backend = Backend(models.WordLevel({"<unk>": 0, "once": 1, "upon": 2, "a": 3, "time": 4}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<unk>"])
    return backend


BACKENDS = {
    "byte_level": byte_level,
    "byte_fallback": byte_fallback,
    "gemma": lambda: byte_fallback(strip=False),
    "metaspace": metaspace,
    "words": words,
}


@pytest.fixture(scope="session", params=BACKENDS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return Tokenizer(BACKENDS[request.param](), {})


@pytest.fixture(scope="session")
def bytes_tokenizer() -> Tokenizer:
    return Tokenizer(byte_level(), {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"})


@pytest.fixture(scope="session")
def llama_tokenizer() -> Tokenizer:
    return Tokenizer(byte_fallback(), {"bos_token": "<s>", "eos_token": "</s>"})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model's folder with a byte-level tokenizer."""
    byte_level().save(str(tmp_path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
        "chat_template": TEMPLATE,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path
