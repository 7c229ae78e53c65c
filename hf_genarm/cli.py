"""The command `hf-genarm`."""

import sys

_COMMANDS = {
    "train": "train an autoregressive reward model on preference pairs",
    "evaluate": "report how well a reward model tells chosen from rejected responses",
    "demo": "open a page on which guidance is tried out",
}
_HELP = "usage: hf-genarm COMMAND [ARGUMENTS]\n\n" + "\n".join(f"  {x:<10} {y}" for x, y in _COMMANDS.items())


def main() -> None:
    """Runs `hf-genarm COMMAND ARGUMENTS`; `hf-genarm COMMAND --help` lists the arguments."""
    command, *rest = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help"):
        print(f"{_HELP}\n\n`hf-genarm COMMAND --help` lists the arguments of a command.")
        return
    if command not in _COMMANDS:
        sys.exit(f"hf-genarm: `{command}` is not a command.\n\n{_HELP}")
    from trl import TrlParser

    from .scripts import demo, evaluate, train

    script = {"train": train, "evaluate": evaluate, "demo": demo}[command]
    parser = TrlParser(script.ARGUMENTS, prog=f"hf-genarm {command}", description=script.__doc__)
    script.main(*parser.parse_args_and_config(rest))


if __name__ == "__main__":
    main()
