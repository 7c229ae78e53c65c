"""Reads the arguments of a command, from the command line and from the file that `--config` names."""

import argparse
import copy
import difflib
import inspect
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from trl import TrlParser

from .shared_arguments import UsageError

# Of the arguments that TRL and transformers define, those that `--help` lists
_USED_MOST = (
    "output_dir",
    "learning_rate",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_length",
    "bf16",
    "gradient_checkpointing",
    "lora_r",
    "lora_alpha",
    "lora_target_modules",
    "load_in_4bit",
    "attn_implementation",
    "logging_steps",
    "eval_strategy",
    "save_steps",
    "resume_from_checkpoint",
    "report_to",
    "push_to_hub",
    "hub_model_id",
    "seed",
)


class Parser(TrlParser):
    """
    Changes TRL's parser so that errors are one sentence, values of files are checked as those of the command line are,
    and the list of arguments is short.

    Args:
        groups (sequence of dataclasses):
            The dataclasses of the arguments.
        name (`str`):
            The command, as in `hf-genarm train`.
        positional (sequence of `str`, *optional*):
            Arguments whose values may come first, without their names.
    """

    def __init__(self, groups: Sequence[Any], name: str, positional: Sequence[str] = ()):
        super().__init__(list(groups), prog=name, add_help=False, formatter_class=_Formatter)
        self._hints = {key: hint for group in groups for key, hint in get_type_hints(group).items()}
        self._positional = positional

    def error(self, message):  # argparse prints all arguments, and exits
        raise UsageError(f"{message[0].upper()}{message[1:].rstrip('.')}. `{self.prog} --help` lists the arguments.")

    def set_defaults_with_config(self, **config):
        for key in config.keys() & self._hints.keys():
            if config[key] is None and type(None) not in get_args(self._hints[key]):
                raise UsageError(f"`{key}` is null, but must have a value. Leave it out for its default.")
            config[key] = _as_text(config[key])
        return super().set_defaults_with_config(**config)

    def read(self, arguments: Sequence[str]) -> tuple[Any, ...]:
        """
        Returns the dataclasses with their values.

        Raises:
            UsageError: if an argument is unknown, or its value is not allowed.
        """
        # TRL looks for `--config FILE` only.
        arguments = [part for x in arguments for part in (x.split("=", 1) if x.startswith("--config=") else [x])]
        for place, name in enumerate(self._positional):
            if arguments[2 * place : 2 * place + 1] and not arguments[2 * place].startswith("-"):
                arguments.insert(2 * place, f"--{name}")
        if "--config" in arguments:
            recipe = "".join(arguments[arguments.index("--config") + 1 :][:1])
            if not Path(recipe).is_file():
                raise UsageError(
                    f"`--config` is `{recipe}`, which is not a file. Name a YAML file: `--config recipe.yaml`."
                )
        # Before anything that is missing, for which a typo may be the reason; argparse takes abbreviations.
        for name in (x.split("=")[0] for x in arguments if x.startswith("--") and x != "--config"):
            if not any(option.startswith(name) for option in self._options):
                raise self._unknown(name, "the command line")
        try:
            *parsed, of_config, of_command_line = self.parse_args_and_config(
                arguments, return_remaining_strings=True, separate_remaining_strings=True
            )
        except UsageError:
            raise
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UsageError(f"The file of `--config` is not valid YAML: {error}") from error
        except (TypeError, ValueError, OSError, ImportError) as error:
            raise UsageError(str(error)) from error
        if of_config:
            raise self._unknown(of_config[0], "the file of `--config`")
        if of_command_line:
            raise self._unknown(of_command_line[0], "the command line")
        return tuple(parsed)

    @property
    def _options(self) -> list[str]:
        return [option for action in self._actions for option in action.option_strings]

    def _unknown(self, given: str, where: str) -> UsageError:
        similar = difflib.get_close_matches(given, self._options, n=1)
        hint = f" Is it `{similar[0]}`?" if similar else ""
        return UsageError(
            f"`{given}`, from {where}, is not an argument.{hint} `{self.prog} --help` lists the arguments."
        )

    def help(self, description: str, is_complete: bool = False) -> str:
        """
        Returns the list of the arguments, those of this package first.

        Args:
            description (`str`):
                What the command does.
            is_complete (`bool`, *optional*, defaults to `False`):
                Whether to list all arguments of TRL and transformers, too.
        """
        formatter = _Formatter(prog=self.prog)
        values = "".join(f" {name.upper()}" for name in self._positional)
        formatter.add_usage(f"{self.prog}{values} [ARGUMENTS]", [], [])
        formatter.add_text(description.strip())
        others = {action.dest: action for action in self._actions}
        for group in self.dataclass_types:
            formatter.start_section(re.sub(r"[\[\]`]", "", str(group.__doc__).strip().splitlines()[0]).rstrip("."))
            formatter.add_arguments([_shown(others.pop(name)) for name in _defined_here(group) if name in others])
            formatter.end_section()
        names = [name for name in others if is_complete or name in _USED_MOST]
        if names:
            formatter.start_section("Of TRL and transformers" + ("" if is_complete else ", what is used most"))
            formatter.add_arguments([_shown(others[name]) for name in names])
            formatter.end_section()
        if len(names) < len(others):
            formatter.add_text(f"`--help_all` lists {len(others) - len(names)} more of TRL and transformers.")
        return formatter.format_help()


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Leaves the lines of a description as they are, and adds defaults to the arguments."""


def _defined_here(group: type) -> Iterator[str]:
    """Yields the names of the arguments that this package defines, or defines differently from TRL."""
    for base in reversed(group.__mro__):
        if base.__module__.partition(".")[0] == __name__.partition(".")[0]:
            yield from inspect.get_annotations(base)


def _shown(action: argparse.Action) -> argparse.Action:
    """Returns an argument as it is listed: with one spelling, without a default that says nothing."""
    shown: Any = copy.copy(action)
    shown.option_strings = [option for option in action.option_strings if "-" not in option[2:]]
    if action.required:
        shown.help = f"{action.help} (required)"
    if action.required or action.default in (None, False, [], ""):
        shown.default = argparse.SUPPRESS
    if action.nargs == "?":  # a flag, which also takes `true` and `false`
        shown.nargs = 0
    return shown


def _as_text(value: Any) -> Any:
    """Writes a value of a YAML file as on the command line, so that it is checked in the same way."""
    if isinstance(value, bool | int | float):
        return str(value)
    return json.dumps(value) if isinstance(value, dict) else value
