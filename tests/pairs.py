"""Three preference pairs, in every dataset format."""

PROMPTS = ["How was the train ride? ", "What is the weather like? ", "Tell me about the food. "]
CHOSEN = ["It was fine and the view was kind.", "It is a fine and warm day today.", "The food was warm."]
REJECTED = ["It was late.", "The sun is cold.", "The food was cold, but the people were hard and late."]

STANDARD = {"prompt": PROMPTS, "chosen": CHOSEN, "rejected": REJECTED}


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
