"""The playground as a Hugging Face Space: three small files and the adapters."""

import shutil
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import SpaceCard, SpaceCardData

from ..demo import DEMO_MODEL_ID
from ..files import make_output_dir
from ..hub.base_model import named_base
from ..hub.card import requirement

_APP = """\
from hf_genarm.scripts.demo import serve

serve({base!r}, {arms!r}, {sentences!r}, host="0.0.0.0")
"""
_ABOUT = """\
# {title}

The same model answers twice, by the same random numbers: unguided, and guided by sentences and by autoregressive reward
models ([GenARM](https://huggingface.co/papers/2410.08193)). A slider that is moved while it writes acts from the next
token on.
"""


def write_space(folder: str, base: str | None, arms: Sequence[str], sentences: Sequence[str] = ()) -> None:
    """
    Writes `app.py`, `requirements.txt` and `README.md`, and copies adapters that are folders.

    Args:
        folder (`str`):
            A new or an empty folder.
        base (`str`, *optional*):
            Hub id of a chat model. Defaults to the base that the reward models name, or else to that of the examples.
        arms (list of `str`):
            Hub ids or folders of reward models.
        sentences (list of `str`, *optional*):
            Sentences that are on the page at the beginning.

    Raises:
        ValueError: if the folder has files in it, the base is a folder, or two adapters have one name.
    """
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"`{folder}` is not empty. Name a new folder for the Space.")
    loaded = base or (named_base(arms)[0] if arms else DEMO_MODEL_ID)
    if Path(loaded).is_dir():
        raise ValueError(
            f"The base `{loaded}` is a folder, but a Space loads its base from the Hub. Give the id of a model: "
            "`--base`."
        )
    copied = {arm: f"adapters/{Path(arm).name}" for arm in arms if Path(arm).is_dir()}
    if len(set(copied.values())) < len(copied):
        raise ValueError(f"Two of the folders {', '.join(copied)} have the same name. Rename one of them.")
    make_output_dir(folder)
    for arm, copy in copied.items():
        shutil.copytree(arm, target / copy)
    (target / "app.py").write_text(
        _APP.format(base=base, arms=[copied.get(arm, arm) for arm in arms], sentences=list(sentences)), encoding="utf-8"
    )
    (target / "requirements.txt").write_text(f"{requirement('demo')}\n", encoding="utf-8")
    title = "Steer while it writes"
    data = SpaceCardData(
        title=title,
        sdk="gradio",
        sdk_version=version("gradio"),
        python_version="3.11",
        app_file="app.py",
        license="apache-2.0",
        models=[loaded, *(arm for arm in arms if arm not in copied)],
        tags=["genarm"],
    )
    SpaceCard(f"---\n{data.to_yaml()}\n---\n\n{_ABOUT.format(title=title)}").save(target / "README.md")
