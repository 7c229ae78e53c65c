"""Reads the files of answers."""

import gzip
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd


def load(path: Path) -> tuple[dict[str, Any], pd.DataFrame]:
    """Returns what the first line of a file describes, and a row per answer, with its words and whether it ended."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        about = json.loads(next(file))
        rows = pd.DataFrame.from_records([json.loads(line) for line in file])
    rows["words"] = rows["text"].str.split().str.len().astype(float)
    rows["ended"] = (rows["n_tokens"] < about["size"]["max_new_tokens"]).astype(float)
    return about, rows


@dataclass(frozen=True)
class Runs:
    """
    The numbers of a method at its settings.

    Attributes:
        points: strength and temperature of each setting.
        values: measures by name, `(n_seeds, n_prompts, n_points)`, each the mean over the answers to a prompt.
        distinct: distinct-2 of one answer to each prompt, for each setting; the mean over seeds.
    """

    points: list[tuple[float, float]]
    values: dict[str, np.ndarray]
    distinct: list[float]

    @property
    def n_seeds(self) -> int:
        return len(self.values["kl"])

    @classmethod
    def of(cls, rows: pd.DataFrame) -> "Runs":
        """Makes the runs from the answers of a method, or of several methods that form one curve."""
        names = rows.select_dtypes("number").columns.difference(["prompt", "seed", "strength", "temperature"])
        cells = rows.groupby(["seed", "prompt", "strength", "temperature"])[list(names)].mean()
        points = sorted(set(zip(rows["strength"], rows["temperature"], strict=True)))
        seeds, prompts = sorted(rows["seed"].unique()), sorted(rows["prompt"].unique())
        index = pd.MultiIndex.from_tuples([(s, p, *point) for s in seeds for p in prompts for point in points])
        assert len(cells) == len(index), "an answer is missing"
        table = cells.reindex(index)
        shape = (len(seeds), len(prompts), len(points))
        values = {name: table[name].to_numpy(dtype=float).reshape(shape) for name in names}
        ones = rows.drop_duplicates(["seed", "prompt", "strength", "temperature"])
        texts = ones.groupby(["strength", "temperature", "seed"])["text"]
        distinct = texts.agg(lambda answers: distinct_n(answers, 2)).groupby(["strength", "temperature"]).mean()
        return cls(points, values, [float(distinct[point]) for point in points])


def distinct_n(texts: Iterable[str], n: int) -> float:
    """Returns the share of different ones among all sequences of `n` words in the texts; NaN if there are none."""
    runs = [tuple(words[i : i + n]) for words in map(str.split, texts) for i in range(len(words) - n + 1)]
    return len(set(runs)) / len(runs) if runs else float("nan")
