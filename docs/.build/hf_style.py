"""Translates docstrings in the style of Hugging Face to the Google style that mkdocstrings reads."""

import re
from pathlib import Path

from griffe import Extension, Object

PAGE = (Path(__file__).parent.parent / "reference.md").read_text(encoding="utf-8")
# The names that docstrings can link to: those of the reference page, and one of transformers
PUBLIC = {path.rsplit(".", 1)[-1]: path for path in re.findall(r"^::: (\S+)", PAGE, re.MULTILINE)}
PUBLIC["LogitsProcessor"] = "transformers.LogitsProcessor"
REFERENCE = re.compile(r"\[`(~?)([\w.]+)`\]")
TYPE = re.compile(r"^(\s+\*{0,2}\w+) \((.*)\):$", re.MULTILINE)


class HuggingFaceStyle(Extension):
    def on_object(self, *, obj: Object, **kwargs) -> None:
        if obj.docstring:
            obj.docstring.value = REFERENCE.sub(_link, TYPE.sub(_plain_type, obj.docstring.value))


def _plain_type(match: re.Match) -> str:
    """Removes the marks from ``name ([`~peft.PeftModel`], *optional*):``, because types are shown as code."""
    of_type = REFERENCE.sub(lambda found: found[2].split(".")[-1], match[2])
    return f"{match[1]} ({re.sub('[`*]', '', of_type)}):"


def _link(match: re.Match) -> str:
    first, *rest = match[2].split(".")
    name = match[2].split(".")[-1] if match[1] else match[2]
    if first not in PUBLIC and not rest:  # not on the page
        return f"`{name}`"
    return f"[`{name}`][{'.'.join([PUBLIC.get(first, first), *rest])}]"
