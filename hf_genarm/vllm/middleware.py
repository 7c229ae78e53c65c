"""What the server does with the body of a request before vLLM reads it, as a `--middleware` of vLLM."""

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from .handshake import handshake
from .request_settings import genarm_keys, shown

_PATHS = ("/completions", "/responses", "/messages")
_LARGEST = 32 * 2**20  # of a larger body nothing is read here
_Message = MutableMapping[str, Any]


class KeysInBody:
    """
    Refuses keys of guidance that vLLM would drop in silence, as they are not in `vllm_xargs`, and lets a request name a
    preset by its model: `"model": "NAME:PRESET"`.

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
                body = _checked(body)
            except ValueError as error:
                await _refuse(send, str(error))
                return
            messages = [{"type": "http.request", "body": body, "more_body": False}]
            others = [x for x in scope["headers"] if x[0] != b"content-length"]
            scope["headers"] = [*others, (b"content-length", str(len(body)).encode())]

        async def replayed() -> _Message:
            return messages.pop(0) if messages else await receive()

        await self._app(scope, replayed, send)


def _checked(body: bytes) -> bytes:
    """
    Returns the body of a request with the preset that its model names.

    Raises:
        ValueError: if a key of guidance is where vLLM does not look for it.
    """
    try:
        request = json.loads(body)
    except ValueError:  # vLLM says so itself
        return body
    if not isinstance(request, dict):
        return body
    for place in ("extra_args", "extra_body", ""):
        keys = request.get(place) if place else request
        found = genarm_keys(keys) if isinstance(keys, dict) else {}
        for key, value in found.items():
            where = f"in `{place}`" if place else "at the top level of the request"
            raise ValueError(f"`{key}` is {shown(value)} {where}, but must be in `vllm_xargs`.")
    xargs = request.get("vllm_xargs")
    if request.get("use_beam_search") and isinstance(xargs, dict) and (found := genarm_keys(xargs)):
        raise ValueError(f"`{min(found)}` has no effect on beam search. Leave it or `use_beam_search` out.")
    name, _, preset = str(request.get("model")).rpartition(":")
    if not name or not any(preset in x.current_presets() for x in handshake.find()):
        return body
    request["vllm_xargs"] = {"genarm_preset": preset, **(xargs if isinstance(xargs, dict) else {})}
    return json.dumps(request).encode()


async def _refuse(send: Callable[[_Message], Awaitable[None]], message: str) -> None:
    """Answers with status 400, as vLLM does."""
    error = {"message": message, "type": "BadRequestError", "param": None, "code": 400}
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": 400, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps({"error": error}).encode()})
