"""Three preference pairs, in every dataset format, and chat templates to write them with."""

from tiny import CHAT_TEMPLATE

PROMPTS = ["How was the train ride? ", "What is the weather like? ", "Tell me about the food. "]
CHOSEN = ["It was fine and the view was kind.", "It is a fine and warm day today.", "The food was warm."]
REJECTED = ["It was late.", "The sun is cold.", "The food was cold, but the people were hard and late."]

STANDARD = {"prompt": PROMPTS, "chosen": CHOSEN, "rejected": REJECTED}

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Tells the weather.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]

_TURN = "{% for m in messages %}<bos>{{ m.role }}: {{ m.content }}<eos>{% endfor %}"
_ASK = "{% if add_generation_prompt %}<bos>assistant: {% endif %}"
# Templates, and what they write after the end of a text
TEMPLATES = {
    "plain": (CHAT_TEMPLATE, ""),
    "a newline after each turn": (_TURN.replace("<eos>", "<eos>\n") + _ASK, "\n"),
    "a tail after the last turn": (_TURN + "{% if not add_generation_prompt %} the end{% endif %}" + _ASK, " the end"),
    "a default system prompt and tools": (
        "<bos>{% if messages[0].role != 'system' %}system: Be kind.<eos>{% endif %}"
        "{% if tools %}tools: {{ tools | tojson }}<eos>{% endif %}"
        + _TURN.replace("m.role", "(m.role | upper if shout else m.role)")
        + "{% if add_generation_prompt %}<bos>{{ 'ASSISTANT' if shout else 'assistant' }}: {% endif %}",
        "",
    ),
    "a generation prompt that texts lack": (_TURN + "{% if add_generation_prompt %}<bos>assistant: <t>{% endif %}", ""),
    "earlier turns are written otherwise": (
        "{% for m in messages %}<bos>{{ m.role }}: {{ m.content if loop.last else m.content[:3] }}<eos>{% endfor %}"
        + _ASK,
        "",
    ),
    "no end tokens": ("{% for m in messages %}## {{ m.role }}\n{{ m.content }}\n{% endfor %}" + _ASK, ""),
    "contents are stripped": (_TURN.replace("m.content", "m.content | trim") + _ASK, ""),
    "a question is required": (
        "{% if not messages | selectattr('role', 'equalto', 'user') | list %}"
        "{{ raise_exception('No question.') }}{% endif %}" + _TURN + _ASK,
        "",
    ),
}


def message(role, text):
    return [{"role": role, "content": text.strip()}]


def conversational(explicit):
    prompts = [message("user", prompt) for prompt in PROMPTS]
    chosen, rejected = [[message("assistant", text) for text in side] for side in (CHOSEN, REJECTED)]
    if explicit:
        return {"prompt": prompts, "chosen": chosen, "rejected": rejected}
    return {
        "chosen": [prompt + text for prompt, text in zip(prompts, chosen, strict=True)],
        "rejected": [prompt + text for prompt, text in zip(prompts, rejected, strict=True)],
    }


def implicit():
    return {
        "chosen": [prompt + text for prompt, text in zip(PROMPTS, CHOSEN, strict=True)],
        "rejected": [prompt + text for prompt, text in zip(PROMPTS, REJECTED, strict=True)],
    }
