from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, decoders
from transformers import PreTrainedTokenizerFast

from jaxserve.config import ConfigError
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.types import ParamError
from tests.text.conftest import TEXT, byte_fallback, byte_level


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"add_bos_token": False},
        {"add_bos_token": True},
        {"add_bos_token": True, "add_eos_token": True},
        {"add_eos_token": True},
        {
            "bos_token": {
                "__type": "AddedToken",
                "content": "he",
                "special": True,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
            }
        },
    ],
)
@pytest.mark.parametrize("make", [byte_fallback, byte_level])
def test_encodes_as_transformers_does(make, config: dict, tmp_path: Path) -> None:
    names = ("<s>", "</s>") if make is byte_fallback else ("<|endoftext|>", "<|im_end|>")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": names[0], "eos_token": names[1], **config}
    make().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours, theirs = Tokenizer.from_folder(tmp_path), PreTrainedTokenizerFast.from_pretrained(str(tmp_path))
    for text in [*TEXT, "", f"a{names[1]}b"]:
        assert ours.encode(text) == theirs.encode(text)
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False)
    assert ours.encode_batch(TEXT) == theirs(TEXT)["input_ids"]
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)


def test_round_trip(tokenizer: Tokenizer) -> None:
    text = "Once upon a time" if tokenizer.vocab_size > 10 else "once upon a time"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_are_hidden_on_request(bytes_tokenizer: Tokenizer) -> None:
    tokens = bytes_tokenizer.encode("a<|im_end|>b")
    assert tokens[1] == bytes_tokenizer.eos_token_id
    assert bytes_tokenizer.decode(tokens) == "ab"
    assert bytes_tokenizer.decode(tokens, skip_special_tokens=False) == "a<|im_end|>b"


def test_token_bytes_spell_the_text(tokenizer: Tokenizer) -> None:
    text = "she loved the café 世界 👍🏽" if tokenizer.vocab_size > 250 else "once upon a time"
    tokens = tokenizer.encode(text, add_special_tokens=False)
    assert b"".join(map(tokenizer.token_bytes, tokens)).decode().lstrip(" ") == text


def test_token_text_is_readable(llama_tokenizer: Tokenizer) -> None:
    ids = {name: llama_tokenizer.token_id(name) for name in ("▁the", "<0xE4>", "</s>")}
    assert [llama_tokenizer.token_text(i) for i in ids.values()] == [" the", "\ufffd", "</s>"]
    assert llama_tokenizer.token_bytes(ids["<0xE4>"]) == b"\xe4"


def test_ids_beyond_the_vocabulary_are_empty(tokenizer: Tokenizer) -> None:
    for token in (tokenizer.vocab_size, tokenizer.vocab_size + 1000, 2**40, -1):
        assert tokenizer.token_bytes(token) == b""
        assert tokenizer.token(token) is None


@pytest.mark.parametrize("tokens", [[-1], [2**70], ["a"], [1.5]])
def test_what_is_no_id_cannot_be_decoded(bytes_tokenizer: Tokenizer, tokens: list) -> None:
    with pytest.raises(ParamError) as error:
        bytes_tokenizer.decode(tokens)
    assert error.value.param == "tokens"


def test_truncation_and_padding_of_the_file_are_ignored(tmp_path: Path) -> None:
    backend = byte_level()
    backend.enable_truncation(4)
    backend.enable_padding(length=50)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokens = Tokenizer.from_folder(tmp_path).encode(TEXT[0])
    assert 4 < len(tokens) < 50


def test_tokens_that_only_the_config_declares(tmp_path: Path) -> None:
    byte_level().save(str(tmp_path / "tokenizer.json"))
    last = byte_level().get_vocab_size()
    declared = {str(last): {"content": "<extra>", "special": True}, "0": {"content": "<|endoftext|>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": declared}))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode("<extra>") == [last]
    assert last in tokenizer.special_ids


def test_special_names_make_ordinary_tokens_special() -> None:
    backend = byte_fallback()
    backend.add_tokens([AddedToken("<end>", special=False)])
    tokenizer = Tokenizer(backend, {"pad_token": "he"})
    assert tokenizer.pad_token_id in tokenizer.special_ids


def test_a_missing_file_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no tokenizer.json.*--tokenizer"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["{", "[]", '"text"'])
def test_a_damaged_file_is_named(folder: Path, name: str, content: str) -> None:
    (folder / name).write_text(content)
    with pytest.raises(ConfigError, match=name):
        Tokenizer.from_folder(folder)


def test_other_decoders_are_refused() -> None:
    backend = byte_level()
    backend.decoder = decoders.WordPiece()
    with pytest.raises(ConfigError, match="WordPiece is not supported"):
        Tokenizer(backend, {})


@pytest.mark.parametrize("text", ["half \ud83d", "\udc4d"])
def test_half_surrogates_are_refused(bytes_tokenizer: Tokenizer, text: str) -> None:
    for texts in ([text], ["fine", text]):
        with pytest.raises(ParamError) as error:
            bytes_tokenizer.encode_batch(texts)
        assert error.value.param == "prompt"
