"""The command `hf-genarm`."""

import ast
import contextlib
import difflib
import errno
import io
import json
import os
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from . import __version__
from .scripts.arguments import ARGUMENTS
from .scripts.shared_arguments import UsageError

_COMMANDS = {
    "train": "train an autoregressive reward model on preference pairs",
    "evaluate": "report how well a reward model distinguishes chosen from rejected responses",
    "tune": "find the strength, reference and temperature to steer with, on held-out prompts",
    "generate": "answer a file of prompts with guidance",
    "lm-eval": "score a guided model with the Language Model Evaluation Harness",
    "show": "print an answer with and without guidance, its tokens coloured",
    "demo": "open a page to try guidance out",
    "publish": "upload a reward model to the Hub",
    "env": "print versions, and how reward models are run here, for reports of problems",
}
_HELP = (
    "usage: hf-genarm [--debug] COMMAND [ARGUMENTS]\n\n"
    + "\n".join(f"  {name:<10} {what}" for name, what in _COMMANDS.items())
    + "\n\n`hf-genarm COMMAND --help` lists the arguments of a command, and `hf-genarm --version` prints the version."
    + "\nWith `--debug`, errors have a traceback."
)
_POSITIONAL = {"publish": ("arm", "repo_id")}

# Errors of wrong input, here and in libraries: their message is for the user. Others are bugs, shown with their type.
_WRONG_INPUT = (ValueError, OSError, ImportError)
_INTERRUPTED, _PIPE_CLOSED = 130, 141  # the exit codes of processes that SIGINT and SIGPIPE end


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Runs `hf-genarm COMMAND ARGUMENTS`; `hf-genarm COMMAND --help` lists the arguments.

    Args:
        arguments (list of `str`, *optional*):
            The command and its arguments. Defaults to those of the process.

    Returns:
        `int`: the exit code: 0; 2 if the command line is wrong; 130 if it was interrupted; 1 after any other error. The
        error is one line on stderr.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # answers have characters that not every terminal can show
    rest = list(sys.argv[1:] if arguments is None else arguments)
    is_debugged = _take_debug(rest)
    command = rest.pop(0) if rest else "--help"
    if command in ("-h", "--help", "--version"):
        print(f"hf_genarm {__version__}" if command == "--version" else _HELP)
        return 0
    parsed: list[Any] = []
    try:
        with warnings.catch_warnings():
            # Warnings for people who write code, not for those who run a command
            warnings.simplefilter("ignore", FutureWarning)
            _run(command, rest, parsed)
        sys.stdout.flush()
    except BrokenPipeError:  # a program such as `head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _PIPE_CLOSED
    except KeyboardInterrupt:
        print(f"\nhf-genarm {command}: Interrupted. {_what_is_kept(command, parsed)}", file=sys.stderr)
        return _INTERRUPTED
    except Exception as error:
        if is_debugged:
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        if _is_full(error):
            values = _values(parsed)
            where = getattr(error, "filename", None) or values.get("output_dir") or values.get("output")
            message = f"`{where}` can't be written: {message}. Make room for it. {_what_is_kept(command, parsed)}"
        elif not isinstance(error, _WRONG_INPUT):
            message = f"{type(error).__name__}: {message} (`hf-genarm --debug {command} …` shows where.)"
        print(f"hf-genarm {command}: {message}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


def _run(command: str, arguments: list[str], parsed: list[Any]) -> None:
    """Runs a command. `parsed` receives its arguments, for what is reported if it ends early."""
    if command not in _COMMANDS:
        similar = difflib.get_close_matches(command, _COMMANDS, n=1)
        hint = f" Is it `{similar[0]}`?" if similar else ""
        raise UsageError(f"`{command}` is not a command.{hint} The commands are {', '.join(_COMMANDS)}.")
    module = f"{__package__}.scripts.{command.replace('-', '_')}"
    if command == "lm-eval":  # whose arguments are those of another program
        import_module(module).main(arguments)
        return
    from .scripts.parser import Parser

    groups = ARGUMENTS.get(command) or import_module(module).ARGUMENTS
    parser = Parser(groups, f"hf-genarm {command}", _POSITIONAL.get(command, ()))
    if {"-h", "--help", "--help_all"} & set(arguments):
        print(parser.help(_docstring(module), is_complete="--help_all" in arguments))
        return
    parsed += parser.read(arguments)
    if not _values(parsed).get("json"):
        import_module(module).main(*parsed)
        return
    with contextlib.redirect_stdout(sys.stderr):
        result = import_module(module).main(*parsed)
    print(json.dumps(result, indent=2))


def _docstring(module: str) -> str:
    """Returns the docstring of a script, which is not imported for it."""
    source = Path(str(find_spec(module).origin)).read_text(encoding="utf-8")  # type: ignore[union-attr]
    return str(ast.get_docstring(ast.parse(source)))


def _take_debug(arguments: list[str]) -> bool:
    """Removes `--debug`, unless a value follows: `transformers` has an argument of that name with a value."""
    for index, argument in enumerate(arguments):
        following = arguments[index + 1 : index + 2]
        if argument == "--debug" and (index == 0 or not following or following[0].startswith("-")):
            del arguments[index]
            return True
    return False


def _values(parsed: Sequence[Any]) -> dict[str, Any]:
    return {name: value for group in parsed for name, value in vars(group).items()}


def _is_full(error: Exception) -> bool:
    """Returns whether a file could not be written to its end. Some libraries report that as an error of their own."""
    reasons = [os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)]
    return any(reason in str(error) for reason in (*reasons, "PytorchStreamWriter failed"))


def _what_is_kept(command: str, parsed: Sequence[Any]) -> str:
    """Returns what a command that ended early has left, and how to go on, as one sentence."""
    values = _values(parsed)
    if command == "train" and values:
        checkpoints = sorted(Path(values["output_dir"]).glob("checkpoint-*"), key=lambda x: x.stat().st_mtime)
        if checkpoints:
            return f"The last checkpoint is kept: add `--resume_from_checkpoint {checkpoints[-1]}` to go on from it."
        return "Nothing is kept, because no checkpoint was saved yet: `--save_steps` says how often."
    if command == "generate" and values:
        return f"The answers so far are kept in `{values['output']}.partial`: the same command continues."
    if command == "tune" and values:
        return f"The settings that were finished are kept in `{values['output_dir']}`: the same command continues."
    return "Nothing is kept."


if __name__ == "__main__":
    sys.exit(main())
