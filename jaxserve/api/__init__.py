"""jaxserve as a library: LLM for scripts and notebooks, AsyncLLM for asyncio programs and servers. Imports no jax."""

from jaxserve.api.async_llm import AsyncLLM, QueueFull, Stream, TransferError
from jaxserve.api.intake import read_intake
from jaxserve.api.llm import LLM

__all__ = ["LLM", "AsyncLLM", "QueueFull", "Stream", "TransferError", "read_intake"]
