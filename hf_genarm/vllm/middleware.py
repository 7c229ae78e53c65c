"""What the server does with the body of a request before vLLM reads it, as a `--middleware` of vLLM."""

import json
from collections.abc import Awaitable, Callable, MutableMapping
from functools import partial
from typing import Any

from .handshake import handshake
from .request_settings import genarm_keys, shown
from .sentence_prompts import with_prompts

_TOKENS = "/inference/v1/generate"  # which takes sampling parameters as they are, `extra_args` too
_PATHS = ("/completions", "/completions/batch", "/responses", "/messages", "/invocations", _TOKENS)
_LARGEST = 32 * 2**20  # of a larger body nothing is read here
_Message = MutableMapping[str, Any]


class KeysInBody:
    """
    Refuses keys of guidance that vLLM would drop in silence, as they are not in `vllm_xargs`, lets a request name a
    preset by its model, `"model": "NAME:PRESET"`, and puts sentences into its prompt.

    Args:
        app (callable):
            The ASGI application that requests go to.
    """

    def __init__(self, app: Callable[..., Awaitable[None]]):
        self._app = app

    async def __call__(
        self,
        scope: _Message,
        receive: Callable[[], Awaitable[_Message]],
        send: Callable[[_Message], Awaitable[None]],
    ) -> None:
        """Passes a request on, or answers it with status 400."""
        if scope["type"] != "http" or scope["method"] != "POST" or not scope["path"].endswith(_PATHS):
            await self._app(scope, receive, send)
            return
        messages = [await receive()]
        while messages[-1].get("more_body") and sum(len(x.get("body", b"")) for x in messages) < _LARGEST:
            messages.append(await receive())
        if messages[-1]["type"] == "http.request" and not messages[-1].get("more_body"):
            body = b"".join(x.get("body", b"") for x in messages)
            try:
                request = _object(body)
                if request is not None:
                    checked = await self._with_prompts(_checked(request, scope["path"]), scope)
                    body = body if checked is request else json.dumps(checked).encode()
            except ValueError as error:
                await _refuse(send, str(error))
                return
            messages = [{"type": "http.request", "body": body, "more_body": False}]
            scope["headers"] = _headers(scope, body)

        async def replayed() -> _Message:
            return messages.pop(0) if messages else await receive()

        await self._app(scope, replayed, send)

    async def _with_prompts(self, request: dict[str, Any], scope: _Message) -> dict[str, Any]:
        """Returns a request with what sentences read, if the server has any."""
        engines = handshake.find()
        if len(engines) != 1 or not (engines[0].sentence_places(0) or engines[0].max_sentences):
            return request
        return await with_prompts(request, scope["path"], engines[0], partial(self._render, scope))

    async def _render(self, scope: _Message, request: dict[str, Any]) -> tuple[int, Any]:
        """Returns the status and the answer of the endpoint that renders the prompt of a request."""
        body, status, answer = json.dumps(request).encode(), 500, b""
        incoming: list[_Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> _Message:
            return incoming.pop() if incoming else {"type": "http.disconnect"}

        async def send(message: _Message) -> None:
            nonlocal status, answer
            status = message.get("status", status)
            answer += message.get("body", b"")

        path = scope["path"] + "/render"
        own = {"path": path, "raw_path": path.encode(), "headers": _headers(scope, body)}
        await self._app({**scope, **own}, receive, send)
        try:
            return status, json.loads(answer)
        except ValueError:  # an error that vLLM has not foreseen
            return status, answer.decode(errors="replace")


def _headers(scope: _Message, body: bytes) -> list[tuple[bytes, bytes]]:
    """Returns the headers of a request with another body."""
    others = [x for x in scope["headers"] if x[0] != b"content-length"]
    return [*others, (b"content-length", str(len(body)).encode())]


def _object(body: bytes) -> dict[str, Any] | None:
    """Reads the body of a request; `None` for what is no object, as vLLM says itself."""
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return request if isinstance(request, dict) else None


def _checked(request: dict[str, Any], path: str) -> dict[str, Any]:
    """
    Returns a request to a path with the preset that its model names.

    Raises:
        ValueError: if a key of guidance is where vLLM does not look for it.
    """
    for place in ("extra_args", "extra_body", ""):
        keys = request.get(place) if place else request
        found = genarm_keys(keys) if isinstance(keys, dict) else {}
        for key, value in found.items():
            where = f"in `{place}`" if place else "at the top level of the request"
            raise ValueError(f"`{key}` is {shown(value)} {where}, but must be in {_place(path)}.")
    xargs = request.get("vllm_xargs")
    if request.get("use_beam_search") and isinstance(xargs, dict) and (found := genarm_keys(xargs)):
        raise ValueError(f"`{min(found)}` has no effect on beam search. Leave it or `use_beam_search` out.")
    name, _, preset = str(request.get("model")).rpartition(":")
    if not name or not any(preset in x.current_presets() for x in handshake.find()):
        return request
    if path.endswith(_TOKENS):
        raise ValueError(f"`model` names the preset {preset!r}, but here it must be `genarm_preset` in {_place(path)}.")
    return request | {"vllm_xargs": {"genarm_preset": preset, **(xargs if isinstance(xargs, dict) else {})}}


def _place(path: str) -> str:
    """Returns where the keys of a request to a path are."""
    return "`extra_args` of `sampling_params`" if path.endswith(_TOKENS) else "`vllm_xargs`"


async def _refuse(send: Callable[[_Message], Awaitable[None]], message: str) -> None:
    """Answers with status 400, as vLLM does."""
    error = {"message": message, "type": "BadRequestError", "param": None, "code": 400}
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": 400, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps({"error": error}).encode()})
