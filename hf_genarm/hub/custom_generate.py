"""The `custom_generate` folder of a Hub repository: guidance without an import in the user's code."""

from importlib.metadata import version
from pathlib import Path

TEMPLATE = Path(__file__).parent / "templates" / "generate.py"


def write_custom_generate(folder: str | Path, model_id: str) -> None:
    """
    Writes what `model.generate(custom_generate=..., trust_remote_code=True)` runs.

    Args:
        folder (`str`):
            The folder of the reward model.
        model_id (`str`):
            Hub id or folder under which the reward model is loaded.
    """
    target = Path(folder, "custom_generate")
    target.mkdir(exist_ok=True)
    # Its Python literal, which is no code whatever characters are in it.
    code = TEMPLATE.read_text(encoding="utf-8").replace('"{{ model_id }}"', ascii(model_id))
    (target / "generate.py").write_text(code, encoding="utf-8")
    (target / "requirements.txt").write_text(f"hf_genarm>={version('hf_genarm')}\n", encoding="utf-8")
