"""`GET /v1/models`: the names under which the model is served."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request

from jaxserve.server.serving import Serving, serving_of

router = APIRouter()


@router.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    serving = serving_of(request)
    return {"object": "list", "data": [_card(serving, name) for name in serving.names]}


@router.get("/v1/models/{name:path}")
async def model(request: Request, name: str) -> dict[str, Any]:
    serving = serving_of(request)
    return _card(serving, serving.model_name(name))


def _card(serving: Serving, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": serving.created,
        "owned_by": "jaxserve",
        "root": serving.names[0],
        "parent": None,
        "max_model_len": serving.llm.limits.max_model_len,
    }
