"""
Opens a page to try guidance out: two answers, with guidance and without, that stream side by side.

    hf-genarm demo --arm user/my-arm --arm model_cards/arm-smollm2-135m-brevity

Without `--arm`, it shows the reward models in the folder `model_cards`. It is served to this machine only, unless
`--host` or `--share` is given. `--export FOLDER` writes a Hugging Face Space instead.
"""

from pathlib import Path

from ..hub.card import requirement
from .arguments import LOOPBACK, BaseArguments, DemoArguments


def main(args: DemoArguments) -> None:
    shipped = (str(path.parent) for path in Path("model_cards").glob("*/adapter_config.json"))
    # First the one with the most visible effect
    arms = args.arm or sorted(shipped, key=lambda name: ("sentiment" not in name, name))
    if not arms:
        raise ValueError(
            "No reward model is given, and there is no folder `model_cards` here. Name one with `--arm`: a Hub id or a "
            "folder."
        )
    if not all(name.strip() for name in arms):
        raise ValueError(f"`arm` is {arms}, of which one is empty. Give Hub ids or folders: `--arm`.")
    if args.export is not None:
        _check_gradio()
        from ..playground.space import write_space

        write_space(args.export, args.base, arms)
        print(f"The Space is in {args.export}. This publishes it:")
        print("hf repos create USER/NAME --type space --sdk gradio")
        print(f"hf upload USER/NAME {args.export} . --type space")
        return
    serve(args.base, arms, args.host, args.port, args.share, arguments=args)


def serve(
    base: str | None,
    arms: list[str],
    host: str = LOOPBACK,
    port: int | None = None,
    share: bool = False,
    arguments: BaseArguments | None = None,
) -> None:
    """
    Loads the models, and serves the page until it is interrupted.

    Args:
        base, arms, host, port, share:
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
    build_page(models).launch(server_name=host, server_port=port, share=share, css=CSS, theme=theme, footer_links=[])


def _check_gradio() -> None:
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise ImportError(f"The playground needs gradio: `pip install '{requirement('demo')}'`.") from error
