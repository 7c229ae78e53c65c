"""
Scores a guided model on the tasks of the Language Model Evaluation Harness.

    hf-genarm lm-eval --model hf-genarm --model_args arm=…,alpha=1 --tasks hellaswag

This is the harness's own command with one more model. `--model_args` takes the arguments of `hf`, where `pretrained`
defaults to the base that the reward model names, and `arm`, `alpha` and `reference`; several reward models are a list,
`arm=["a","b"],alpha=[1,0.5]`. `sentence` steers by a sentence, before the text of each request.
"""

import sys

from ..hub.card import requirement


def main(arguments: list[str]) -> None:
    """
    Runs the command of the harness.

    Args:
        arguments (list of `str`):
            The arguments of `lm-eval`.

    Raises:
        ImportError: if the harness is not installed.
    """
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        raise ImportError(
            f"This needs the Language Model Evaluation Harness: `pip install '{requirement('eval')}'`."
        ) from error
    from .. import lm_eval  # noqa: F401  registers the model

    sys.argv = ["lm-eval", *arguments]  # the harness reads them nowhere else
    cli_evaluate()
