"""What a reward model with other tokens reads in place of a prompt that the base was given as tokens."""

from collections.abc import Sequence

from .byte_map import ByteMap


class PromptReader:
    """
    Writes prompts of the base in tokens of a reward model: as the same text.

    Args:
        byte_map ([`ByteMap`]):
            The tokens of both.
    """

    def __init__(self, byte_map: ByteMap):
        self._byte_map = byte_map
        self.tokenizer = byte_map.reward_tokenizer

    def __call__(self, ids: Sequence[int]) -> list[int]:
        """
        Returns the tokens of the reward model for one prompt, without padding.

        Raises:
            ValueError: if it has special tokens that the reward model doesn't know, or no text.
        """
        tokenizer, of_base = self._byte_map.tokenizer, self._byte_map.of_base
        special = {index for index in ids[1:] if not 0 <= index < len(of_base) or of_base[index] is None}
        if ids[0] == tokenizer.bos_token_id and len(ids) > 1 and not special:  # before a plain text
            ids = ids[1:]
        elif not 0 <= ids[0] < len(of_base) or of_base[ids[0]] is None:
            special.add(ids[0])
        known = set(self.tokenizer.all_special_tokens) | set(self.tokenizer.get_added_vocab())
        unknown = sorted(str(x) for x in tokenizer.convert_ids_to_tokens(sorted(special)) if x not in known)
        if unknown:
            raise ValueError(
                f"The prompt has the special tokens {', '.join(map(repr, unknown))}, which the reward model "
                f"(`{self.tokenizer.name_or_path}`) doesn't have: it must read the chat in its own template. Use "
                "`generate(**processor.encode(chats), logits_processor=[processor])`, or set `processor.prompts`."
            )
        text = str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
        read = self.tokenizer(text, add_special_tokens=not special)["input_ids"]  # a template writes them itself
        if not read:
            raise ValueError(
                f"The prompt is {text!r}, which has no tokens of the reward model (`{self.tokenizer.name_or_path}`). "
                "Give a text or a chat."
            )
        return read
