"""The command `hf-genarm`."""

import difflib
import io
import json
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, get_args, get_type_hints

_COMMANDS = {
    "train": "train an autoregressive reward model on preference pairs",
    "evaluate": "report how well a reward model distinguishes chosen from rejected responses",
    "tune": "find the strength, reference and temperature to steer with, on held-out prompts",
    "generate": "answer a file of prompts with guidance",
    "lm-eval": "score a guided model with the Language Model Evaluation Harness",
    "show": "print an answer with and without guidance, its tokens coloured",
    "demo": "open a page to try guidance out",
    "env": "print versions, and how reward models are run here, for reports of problems",
}
_HELP = (
    "usage: hf-genarm [--debug] COMMAND [ARGUMENTS]\n\n"
    + "\n".join(f"  {name:<10} {what}" for name, what in _COMMANDS.items())
    + "\n\n`hf-genarm COMMAND --help` lists the arguments of a command. With `--debug`, errors have a traceback."
)

# Errors of wrong input, here and in libraries: their message is for the user. Others are bugs, shown with their type.
_WRONG_INPUT = (ValueError, OSError, ImportError)


class UsageError(ValueError):
    """Is raised when the command line itself is wrong."""


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Runs `hf-genarm COMMAND ARGUMENTS`; `hf-genarm COMMAND --help` lists the arguments.

    Args:
        arguments (list of `str`, *optional*):
            The command and its arguments. Defaults to those of the process.

    Returns:
        `int`: the exit code: 0; 2 if the command line is wrong; 1 after any other error. The error is one line on
        stderr.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # answers have characters that not every terminal can show
    rest = list(sys.argv[1:] if arguments is None else arguments)
    is_debugged = _take_debug(rest)
    command = rest.pop(0) if rest else "--help"
    if command in ("-h", "--help"):
        print(_HELP)
        return 0
    try:
        with warnings.catch_warnings():
            # Warnings for people who write code, not for those who run a command
            warnings.simplefilter("ignore", FutureWarning)
            _run(command, rest)
    except Exception as error:
        if is_debugged:
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        if not isinstance(error, _WRONG_INPUT):
            message = f"{type(error).__name__}: {message} (`hf-genarm --debug {command} …` shows where.)"
        print(f"hf-genarm {command}: {message}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


def _run(command: str, arguments: list[str]) -> None:
    if command not in _COMMANDS:
        raise UsageError(f"`{command}` is not a command. The commands are {', '.join(_COMMANDS)}.")
    script = import_module(f".scripts.{command.replace('-', '_')}", __package__)
    if command == "lm-eval":  # whose arguments are those of another program
        script.main(arguments)
        return
    script.main(*parse(script, f"hf-genarm {command}", arguments))


def _take_debug(arguments: list[str]) -> bool:
    """Removes `--debug`, unless a value follows: `transformers` has an argument of that name with a value."""
    for index, argument in enumerate(arguments):
        following = arguments[index + 1 : index + 2]
        if argument == "--debug" and (index == 0 or not following or following[0].startswith("-")):
            del arguments[index]
            return True
    return False


def parse(script: ModuleType, name: str, arguments: list[str]) -> tuple[Any, ...]:
    """
    Parses the arguments of a script, from the command line and the file that `--config` names.

    Raises:
        UsageError: if an argument is unknown, or its value is not allowed.
    """
    import yaml
    from trl import TrlParser

    hints = {key: hint for group in script.ARGUMENTS for key, hint in get_type_hints(group).items()}

    class Parser(TrlParser):
        def error(self, message):  # argparse prints all arguments, and exits
            raise UsageError(f"{message[0].upper()}{message[1:].rstrip('.')}. `{name} --help` lists the arguments.")

        def set_defaults_with_config(self, **config):
            for key in config.keys() & hints.keys():
                if config[key] is None and type(None) not in get_args(hints[key]):
                    raise UsageError(f"`{key}` is null, but must have a value. Leave it out for its default.")
                config[key] = _as_text(config[key])
            return super().set_defaults_with_config(**config)

    # TRL looks for `--config FILE` only.
    arguments = [part for x in arguments for part in (x.split("=", 1) if x.startswith("--config=") else [x])]
    if "--config" in arguments:
        recipe = "".join(arguments[arguments.index("--config") + 1 :][:1])
        if not Path(recipe).is_file():
            raise UsageError(
                f"`--config` is `{recipe}`, which is not a file. Name a YAML file: `--config recipe.yaml`."
            )
    parser = Parser(script.ARGUMENTS, prog=name, description=script.__doc__)
    try:
        *parsed, of_config, of_command_line = parser.parse_args_and_config(
            arguments, return_remaining_strings=True, separate_remaining_strings=True
        )
    except UsageError:
        raise
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"The file of `--config` is not valid YAML: {error}") from error
    except (TypeError, *_WRONG_INPUT) as error:
        raise UsageError(str(error)) from error
    if of_config or of_command_line:
        given = (of_config or of_command_line)[0]
        known = [option for action in parser._actions for option in action.option_strings]
        similar = difflib.get_close_matches(given.split("=")[0], known, n=1)
        hint = f" Is it `{similar[0]}`?" if similar else ""
        where = "the file of `--config`" if of_config else "the command line"
        raise UsageError(f"`{given}`, from {where}, is not an argument.{hint} `{name} --help` lists the arguments.")
    return tuple(parsed)


def _as_text(value: Any) -> Any:
    """Writes a value of a YAML file as on the command line, so that it is checked in the same way."""
    if isinstance(value, bool | int | float):
        return str(value)
    return json.dumps(value) if isinstance(value, dict) else value


if __name__ == "__main__":
    sys.exit(main())
