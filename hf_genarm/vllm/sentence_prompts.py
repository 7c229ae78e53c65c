"""Puts sentences into the prompts of requests, in the front end, where vLLM itself renders what a model reads."""

import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from ..hub.sentence import check_sentence, in_chat, in_text
from .request_settings import PROMPTS, SENTENCES, ServerDefaults, genarm_keys, request_strengths, shown

# Sends a request to the endpoint of vLLM that renders its prompt; returns the status and the answer.
Render = Callable[[dict[str, Any]], Awaitable[tuple[int, Any]]]

# That of vLLM's `SamplingParams`, whose defaults are left out of what `/render` answers
_DEFAULT_MAX_TOKENS = 16

_CHAT, _TEXT = "/chat/completions", "/completions"


async def with_prompts(request: dict[str, Any], path: str, defaults: ServerDefaults, render: Render) -> dict[str, Any]:
    """
    Returns a request that has what sentences read, token ids in `genarm_prompts`, and no more `max_tokens` than fit.

    Args:
        request (`dict`):
            The body of a request, which is not changed.
        path (`str`):
            Its path. Only chats and completions have prompts that a sentence can be put into.
        defaults ([`ServerDefaults`]):
            The defaults of the server.
        render (callable):
            Returns the status and the answer of vLLM's `/render` for a body.

    Raises:
        ValueError: if that can't be done.
    """
    xargs = request.get("vllm_xargs")
    xargs = {} if xargs is None else xargs
    if not isinstance(xargs, dict) or request.get("use_beam_search") or not path.endswith(_TEXT):
        return request  # what needs prompts is refused without them
    renderer = _Renderer(request, path.endswith(_CHAT), render)
    keys = genarm_keys(xargs)
    if PROMPTS in keys:
        if SENTENCES in keys:
            raise ValueError(f"`{SENTENCES}` is given with `{PROMPTS}`, but the prompts stand for the sentences.")
        if not isinstance(keys[PROMPTS], list):
            return request
        prompts = [await renderer.given(x) for x in keys[PROMPTS]]
    else:
        own = _own_sentences(keys.pop(SENTENCES, []), defaults)
        places = defaults.sentence_places(len(own))
        alpha = request_strengths(keys, defaults, len(own)).alpha
        if not places:
            return request
        sentences = [*(x for x in defaults.sentences if x is not None), *own]
        prompts = [
            await renderer.with_sentence(sentence) if alpha[place] else []
            for place, sentence in zip(places, sentences, strict=True)
        ]
    changed = {key: value for key, value in xargs.items() if key != SENTENCES} | {PROMPTS: json.dumps(prompts)}
    return request | renderer.limit | {"vllm_xargs": changed}


class _Renderer:
    """Renders variants of a request."""

    def __init__(self, request: dict[str, Any], is_chat: bool, render: Render):
        self._request, self._is_chat, self._render = request, is_chat, render
        self._plain: list[int] | None = None
        self._max_tokens: list[int] = []

    @property
    def limit(self) -> dict[str, int]:
        """What a request has to be given so that the answer fits after each prompt."""
        name = "max_completion_tokens" if self._is_chat else "max_tokens"
        return {name: min(self._max_tokens)} if self._max_tokens else {}

    async def given(self, prompt: Any) -> list[int]:
        """Returns the token ids of a prompt that a client has given: messages, a text, or token ids."""
        if isinstance(prompt, list) and all(type(x) is int for x in prompt):
            return prompt
        if self._is_chat and _is_chat(prompt):
            return await self._ids({"messages": prompt})
        if not self._is_chat and isinstance(prompt, str) and prompt:
            return await self._ids({"prompt": prompt})
        kind = "messages" if self._is_chat else "a text"
        raise ValueError(f"`{PROMPTS}` has {shown(prompt)}, but must have {kind} or token ids for each sentence.")

    async def with_sentence(self, sentence: str) -> list[int]:
        """Returns the token ids of the prompt of the request with a sentence in it."""
        if not self._is_chat:
            prompt = self._request.get("prompt")
            if not isinstance(prompt, str):
                raise ValueError(
                    f"The sentence {shown(sentence)} can be put into one text, but `prompt` is {shown(prompt)}. Give "
                    f"one text for each request, or the token ids of what the sentence reads in `{PROMPTS}`."
                )
            return await self._ids({"prompt": in_text(prompt, sentence)})
        messages: Any = self._request.get("messages")
        if not _is_chat(messages):
            raise ValueError(f"`messages` is {shown(messages)}, but must be a chat that a sentence can be put into.")
        for has_system_messages in (True, False):
            chat = in_chat(messages, sentence, has_system_messages)
            try:
                ids = await self._ids({"messages": chat})
            except ValueError:
                if not has_system_messages:
                    raise
                continue  # a template may refuse system messages, and a few drop them
            if ids != self._plain:
                return ids
        raise ValueError(f"The chat template leaves out the sentence {shown(sentence)}, so that it can't steer.")

    async def _ids(self, other: dict[str, Any]) -> list[int]:
        """Returns the token ids of a variant of the request; renders first the request itself."""
        if other and self._plain is None:
            self._plain = await self._ids({})
        cut = self._request.get("truncate_prompt_tokens")
        if other and cut is not None:
            raise ValueError(
                f"`truncate_prompt_tokens` is {shown(cut)}, but would cut off what a sentence puts before the prompt. "
                "Leave it out, and send a prompt that fits."
            )
        body = {key: value for key, value in self._request.items() if key != "vllm_xargs"} | other
        status, answer = await self._render(body)
        if status == 403:
            raise ValueError(
                "Sentences are put into prompts by the endpoint of vLLM that renders them, which is closed. Start the "
                "server with `python -m hf_genarm.vllm`, or with `--enable-scale-out`."
            )
        if status != 200:
            message = answer.get("error", answer) if isinstance(answer, Mapping) else answer
            message = message.get("message", message) if isinstance(message, Mapping) else message
            raise ValueError(f"A prompt of the request can't be rendered. {shown(message, '')}")
        rendered, *others = answer if isinstance(answer, list) else [answer]
        if others:
            raise ValueError(f"`prompt` has {1 + len(others)} prompts, but with `{PROMPTS}` there must be one alone.")
        self._max_tokens.append(rendered["sampling_params"].get("max_tokens", _DEFAULT_MAX_TOKENS))
        return rendered["token_ids"]


def _own_sentences(value: Any, defaults: ServerDefaults) -> list[str]:
    """Reads the sentences that a request adds: one, or a list."""
    sentences = [value] if isinstance(value, str) else value
    try:
        if not isinstance(sentences, list):
            raise TypeError
        sentences = [check_sentence(SENTENCES, x) for x in sentences]
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`{SENTENCES}` is {shown(value)}, but must be a text that asks for something, or a list of them."
        ) from error
    if len(sentences) > defaults.max_sentences:
        rule = f"{defaults.max_sentences} sentences at most (`max_sentences` of the server)"
        raise ValueError(f"`{SENTENCES}` is {shown(value)}, but must be {rule}.")
    return sentences


def _is_chat(messages: Any) -> bool:
    """Returns whether a value is a chat, of whose messages those that may get a sentence have content."""
    return (
        isinstance(messages, list)
        and bool(messages)
        and all(isinstance(x, dict) and isinstance(x.get("role"), str) for x in messages)
        and all(isinstance(x.get("content"), str | list) for x in messages if x["role"] in ("system", "user"))
    )
