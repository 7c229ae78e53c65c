"""Where results go, checked before there are any."""

import os
from pathlib import Path


def make_output_dir(folder: str | Path) -> None:
    """
    Makes a folder for results, before what takes hours.

    Raises:
        ValueError: if files can't be written there.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"`{folder}` can't be the folder of the results: {error.strerror}. Name another one."
        ) from error
    if not os.access(folder, os.W_OK):
        raise ValueError(f"`{folder}` can't be the folder of the results: it can't be written to. Name another one.")
