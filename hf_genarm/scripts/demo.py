"""
Opens a page to try guidance out: two answers, with guidance and without, that stream side by side.

    hf-genarm demo --arm user/my-arm --arm model_cards/arm-smollm2-135m-brevity

Without `--arm`, it shows the reward models in the folder `model_cards`. It is served to this machine only, unless
`--host` or `--share` is given. `--export FOLDER` writes a Hugging Face Space instead.
"""

from dataclasses import dataclass, field
from pathlib import Path

from .guided_model import BaseArguments

LOOPBACK = "127.0.0.1"


@dataclass
class DemoArguments(BaseArguments):
    """Chooses the reward models to show, and the address of the page."""

    arm: list[str] | None = field(
        default=None,
        metadata={
            "help": "Hub id or folder of a reward model, an adapter on the base. Repeatable.",
            "action": "extend",
        },
    )
    host: str = field(default=LOOPBACK, metadata={"help": "Address to serve on. '0.0.0.0' serves the whole network."})
    port: int | None = field(default=None, metadata={"help": "Port to serve on. Defaults to a free one from 7860 on."})
    share: bool = field(default=False, metadata={"help": "Whether to open a public link through gradio.live."})
    export: str | None = field(default=None, metadata={"help": "Writes a Hugging Face Space into this folder instead."})

    def __post_init__(self) -> None:
        if self.port is not None and not 1 <= self.port <= 65535:
            raise ValueError(f"`port` is {self.port}, but must be from 1 to 65535. Leave it out for a free one.")


ARGUMENTS = (DemoArguments,)


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
        raise ImportError("The playground needs gradio: `pip install hf_genarm[demo]`.") from error
