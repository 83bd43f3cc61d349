"""`POST /tokenize` and `/detokenize`: a model's tokens without running it."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request

from jaxserve.server.errors import invalid
from jaxserve.server.limits import read_body
from jaxserve.server.protocol import DetokenizeBody, TokenizeBody, parse
from jaxserve.server.serving import serving_of

router = APIRouter()


@router.post("/tokenize")
async def tokenize(request: Request) -> dict[str, Any]:
    serving = serving_of(request)
    llm = serving.llm
    body = parse(TokenizeBody, await read_body(request, serving.max_body_bytes))
    serving.model_name(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise invalid("/tokenize takes either prompt or messages.", "prompt")
    text, special = body.prompt, True
    if body.messages is not None:
        text, special = await serving.render(body), False
    if body.add_special_tokens is not None:
        special = body.add_special_tokens
    tokens = await llm.encode(text or "", special)
    answer = {"count": len(tokens), "max_model_len": llm.limits.max_model_len, "tokens": tokens}
    if body.return_token_strs:
        answer["token_strs"] = [llm.tokenizer.token(token) for token in tokens]
    return answer


@router.post("/detokenize")
async def detokenize(request: Request) -> dict[str, Any]:
    serving = serving_of(request)
    body = parse(DetokenizeBody, await read_body(request, serving.max_body_bytes))
    serving.model_name(body.model)
    width = serving.llm.limits.vocab_size
    for token in body.tokens:
        if not 0 <= token < width:
            raise invalid(f"tokens names token {token}, but this model has {width} tokens.", "tokens")
    return {"prompt": serving.llm.tokenizer.decode(body.tokens, skip_special_tokens=bool(body.skip_special_tokens))}
