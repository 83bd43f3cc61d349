from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.text.detokenizer import Detokenizer
from jaxserve.text.tokenizer import Tokenizer
from tests.text.conftest import BACKENDS, TEXT

TOKENIZERS = {name: Tokenizer(make(), {}) for name, make in BACKENDS.items()}
BYTE_FALLBACK = ("byte_fallback", "gemma")


def stream(tokenizer: Tokenizer, tokens: Sequence[int], prompt: Sequence[int] = (), skip: bool = True) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt, skip)
    return [*(detokenizer.push((token,)) for token in tokens), detokenizer.flush()]


def whole_bytes(tokenizer: Tokenizer, tokens: Sequence[int]) -> bool:
    """Every run of byte tokens is valid UTF-8: the case in which the library decodes runs by parts."""
    run = b""
    for token in [*tokens, None]:
        spelled = "" if token is None else tokenizer.token(token) or ""
        if spelled.startswith("<0x"):
            run += tokenizer.token_bytes(token)
        elif spelled or token is None:
            try:
                run.decode()
            except UnicodeDecodeError:
                return False
            run = b""
    return True


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("skip", [True, False])
@given(data=st.data())
def test_equals_the_whole_decoded(name: str, skip: bool, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    tokens = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 2), max_size=24))
    shown = [token for token in tokens if not (skip and token in tokenizer.special_ids)]
    if name in BYTE_FALLBACK and not whole_bytes(tokenizer, shown):
        return
    assert "".join(stream(tokenizer, tokens, skip=skip)) == tokenizer.decode(tokens, skip)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=st.text(max_size=30) | st.sampled_from(TEXT))
def test_any_text_comes_back_in_whole_characters(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    tokens = tokenizer.encode(text)
    pieces = stream(tokenizer, tokens)
    assert "".join(pieces) == tokenizer.decode(tokens)
    if "\ufffd" not in tokenizer.decode(tokens):
        assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data())
def test_continues_its_prompt(name: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    tokens = tokenizer.encode(data.draw(st.sampled_from(TEXT)))
    cut = data.draw(st.integers(0, len(tokens)))
    before = "".join(stream(tokenizer, tokens[:cut])[:-1])  # without what half a character comes to
    assert before + "".join(stream(tokenizer, tokens[cut:], tokens[:cut])) == tokenizer.decode(tokens)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data())
def test_chunks_do_not_matter(name: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    chunks = data.draw(st.lists(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=4), max_size=8))
    detokenizer = Detokenizer(tokenizer)
    text = "".join(detokenizer.push(chunk) for chunk in chunks) + detokenizer.flush()
    assert text == "".join(stream(tokenizer, [token for chunk in chunks for token in chunk]))


def test_a_space_in_front_belongs_to_the_answer(llama_tokenizer: Tokenizer) -> None:
    the = llama_tokenizer.token_id("▁the")
    assert stream(llama_tokenizer, [the], prompt=llama_tokenizer.encode("o")) == [" the", ""]
    assert stream(llama_tokenizer, [the], prompt=[llama_tokenizer.bos_token_id]) == ["the", ""]


def test_a_bad_byte_spoils_only_itself(llama_tokenizer: Tokenizer) -> None:
    tokens = [llama_tokenizer.token_id(f"<0x{byte:02X}>") for byte in "€".encode() + b"\xff\xe2\x82"]
    assert stream(llama_tokenizer, tokens, prompt=[]) == ["", "", "€", "\ufffd", "", "", "\ufffd\ufffd"]


@given(repeats=st.integers(0, 200))
def test_half_characters_are_not_kept_for_long(repeats: int) -> None:
    """A model that repeats the first byte of a character must not make every step dearer than the one before."""
    tokenizer = TOKENIZERS["byte_level"]
    lead = tokenizer.token_id("ð")
    assert lead is not None and tokenizer.token_bytes(lead) == b"\xf0"
    pieces = stream(tokenizer, [lead] * repeats)
    assert len("".join(pieces[:-1])) >= repeats - 3
