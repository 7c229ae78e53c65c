"""Hooks of mkdocs: they draw formulas as MathML, which needs no script, and resolve links out of the site."""

import html
import posixpath
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File
from mkdocs.utils import get_relative_url

ROOT = Path(__file__).parent.parent.parent
REPOSITORY = "https://github.com/hf-genarm/hf_genarm/blob/main"
HUGGING_FACE = "https://huggingface.co/docs"
# Files elsewhere in the repository that are pages of the site, and what these are called there
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "model_cards/README.md": "adapters.md",
    "examples/README.md": "examples.md",
}
TYPES = {
    "datasets.Dataset": f"{HUGGING_FACE}/datasets/package_reference/main_classes",
    "datasets.IterableDataset": f"{HUGGING_FACE}/datasets/package_reference/main_classes",
    "huggingface_hub.ModelCard": f"{HUGGING_FACE}/huggingface_hub/package_reference/cards",
    "matplotlib.axes.Axes": "https://matplotlib.org/stable/api/_as_gen/matplotlib.axes.Axes.html",
    "peft.PeftConfig": f"{HUGGING_FACE}/peft/package_reference/config",
    "peft.PeftModel": f"{HUGGING_FACE}/peft/package_reference/peft_model",
    "torch.Tensor": "https://docs.pytorch.org/docs/stable/tensors.html",
    "torch.nn.Module": "https://docs.pytorch.org/docs/stable/generated/torch.nn.Module.html",
    "transformers.BatchEncoding": f"{HUGGING_FACE}/transformers/main_classes/tokenizer",
    "transformers.EvalPrediction": f"{HUGGING_FACE}/transformers/internal/trainer_utils",
    "transformers.LogitsProcessor": f"{HUGGING_FACE}/transformers/internal/generation_utils",
    "transformers.PreTrainedModel": f"{HUGGING_FACE}/transformers/main_classes/model",
    "transformers.PreTrainedTokenizerBase": f"{HUGGING_FACE}/transformers/main_classes/tokenizer",
    "transformers.Trainer": f"{HUGGING_FACE}/transformers/main_classes/trainer",
    "transformers.TrainerCallback": f"{HUGGING_FACE}/transformers/main_classes/callback",
    "transformers.TrainingArguments": f"{HUGGING_FACE}/transformers/main_classes/trainer",
    "trl.GRPOTrainer": f"{HUGGING_FACE}/trl/grpo_trainer",
    "trl.LogCompletionsCallback": f"{HUGGING_FACE}/trl/callbacks",
    "trl.RewardConfig": f"{HUGGING_FACE}/trl/reward_trainer",
    "trl.RewardTrainer": f"{HUGGING_FACE}/trl/reward_trainer",
}
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
IN_HTML = re.compile(r'\b(src|srcset)="(images/[^"]+)"')
TO_REPOSITORY = re.compile(r"\]\(\.\./([^)#\s]+)(#[^)\s]*)?\)")


def on_pre_build(config) -> None:
    """Registers where the documentation of other libraries explains the types in our signatures."""
    for name, url in TYPES.items():
        config.plugins["autorefs"].register_url(name, f"{url}#{name}")


def on_files(files, config):
    """Adds pages of other folders, and the pictures of `examples` and `model_cards`."""
    for source, name in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        text = re.sub(r"^\[!\[.*\n", "", text, flags=re.MULTILINE)  # badges, which are pictures of other servers
        folder = posixpath.dirname(source)

        def moved(match: re.Match, folder: str = folder) -> str:
            return match[1] + posixpath.join("..", posixpath.normpath(posixpath.join(folder, match[2])))

        text = re.sub(r'(\]\(|src="|srcset=")(?!\w+:|#)([^)"#\s]+)', moved, text)
        files.append(File.generated(config, name, content=text.replace("../docs/", "")))
    for folder in ("examples", "model_cards"):
        for path in sorted((ROOT / folder).rglob("*.png")):
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, f"repository/{name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page, **kwargs) -> str:
    """
    Resolves links out of `docs/`, which work unchanged on GitHub: to copied pictures, or to the repository. So are
    those to pictures in HTML, which mkdocs leaves as they are.
    """

    def link(match: re.Match) -> str:
        if not (ROOT / match[1]).exists():
            raise PluginError(f"{page.file.src_path} links to `../{match[1]}`, which doesn't exist.")
        if match[1] in PAGES:
            return f"]({PAGES[match[1]]}{match[2] or ''})"
        return (
            f"](repository/{match[1]})" if match[1].endswith(".png") else f"]({REPOSITORY}/{match[1]}{match[2] or ''})"
        )

    def from_here(match: re.Match) -> str:
        return f'{match[1]}="{get_relative_url(match[2], page.url)}"'

    return TO_REPOSITORY.sub(link, IN_HTML.sub(from_here, markdown))


def on_page_content(content: str, **kwargs) -> str:
    """Replaces formulas by MathML."""

    def draw(match: re.Match) -> str:
        return convert(html.unescape(match[3]), display="inline" if match[2] == "(" else "block")

    return FORMULA.sub(draw, content)
