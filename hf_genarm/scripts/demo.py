"""
Opens a page to try guidance out: two answers, with guidance and without, that stream side by side.

    hf-genarm demo --base Qwen/Qwen2.5-0.5B-Instruct --sentence "Answer like a pirate."
    hf-genarm demo --arm user/my-arm --arm model_cards/arm-smollm2-135m-brevity

Without `--sentence` and `--arm` it begins with a sentence and, if the base is the model of the examples, with the
adapters in the folder `model_cards`. It is served to this machine only, unless `--host` or `--share` is given.
`--export FOLDER` writes a Hugging Face Space instead.
"""

from collections.abc import Sequence
from pathlib import Path

from ..demo import DEMO_MODEL_ID
from ..hub.card import requirement
from .arguments import LOOPBACK, DemoArguments
from .shared_arguments import BaseArguments

# What the page begins with, unless other sentences or adapters are given
SENTENCE = "You are an extremely positive, enthusiastic person who loves everything."


def main(args: DemoArguments) -> None:
    sentences, arms = args.sentence or [], args.arm or []
    if not sentences and not arms:
        sentences, arms = [SENTENCE], _shipped() if args.base in (None, DEMO_MODEL_ID) else []
        if not arms:
            print("The page begins without an adapter. Name one with `--arm`, or load it on the page.")
    if not all(name.strip() for name in arms):
        raise ValueError(f"`arm` is {arms}, of which one is empty. Give Hub ids or folders: `--arm`.")
    if args.export is not None:
        _check_gradio()
        from ..playground.space import write_space

        write_space(args.export, args.base, arms, sentences)
        print(f"The Space is in {args.export}. This publishes it:")
        print("hf repos create USER/NAME --type space --sdk gradio")
        print(f"hf upload USER/NAME {args.export} . --type space")
        return
    serve(args.base, arms, sentences, args.host, args.port, args.share, arguments=args)


def _shipped() -> list[str]:
    """Returns the adapters of a clone of the repository, first the one with the most visible effect."""
    folders = (str(path.parent) for path in Path("model_cards").glob("*/adapter_config.json"))
    return sorted(folders, key=lambda name: ("sentiment" not in name, name))


def serve(
    base: str | None,
    arms: list[str],
    sentences: Sequence[str] = (),
    host: str = LOOPBACK,
    port: int | None = None,
    share: bool = False,
    arguments: BaseArguments | None = None,
) -> None:
    """
    Loads the models, and serves the page until it is interrupted.

    Args:
        base, arms, sentences, host, port, share:
            As for the command.
        arguments ([`BaseArguments`], *optional*):
            How to load the base. Defaults to the defaults of the command.

    Raises:
        ImportError: if gradio is not installed.
    """
    _check_gradio()
    import gradio as gr

    from ..playground.models import Models
    from ..playground.page import CSS, build_page

    is_private = host in (LOOPBACK, "localhost", "::1") and not share
    if not is_private:
        print("Anyone who can reach this page can use this machine to write text, and load adapters from the Hub.")
    loaded = (arguments or BaseArguments(base=base)).load(arms)
    models = Models(loaded, arms, takes_folders=is_private)
    # A font of the system, so that a page on this machine loads nothing from elsewhere
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    theme.set(block_info_text_color="*neutral_500")  # legible
    page = build_page(models, sentences)
    page.launch(server_name=host, server_port=port, share=share, css=CSS, theme=theme, footer_links=[])


def _check_gradio() -> None:
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise ImportError(f"The playground needs gradio: `pip install '{requirement('demo')}'`.") from error
