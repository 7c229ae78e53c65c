"""Results are whole or not there, and intervals are those of the bootstrap."""

import os

import numpy as np
import pytest

from hf_genarm.bootstrap import interval, mean_with_interval, resampled_means
from hf_genarm.files import whole, write_whole


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "new" / "file.txt"
    write_whole(path, "one")
    with pytest.raises(TypeError), whole(path) as partial:
        partial.write_text(["half"])
    assert path.read_text() == "one"
    with whole(path) as partial:
        partial.write_text("two")
        assert path.read_text() == "one"
    assert path.read_text() == "two"
    assert os.listdir(path.parent) == ["file.txt"]


def test_a_folder_that_another_process_has_made(tmp_path):
    (tmp_path / "folder" / "file").mkdir(parents=True)
    with pytest.raises(OSError, match="not empty"), whole(tmp_path / "folder") as partial:
        partial.mkdir()
    assert os.listdir(tmp_path) == ["folder"]


def test_measures_of_one_item_stay_together():
    rng = np.random.default_rng(0)
    x = rng.normal(size=200)
    means = resampled_means(np.stack([x, 2 * x + 1], axis=1), 4_000, seed=1)
    assert means.shape == (4_000, 2)
    assert means[:, 1] == pytest.approx(2 * means[:, 0] + 1)
    half = 1.96 * x.std() / np.sqrt(len(x))
    assert interval(means[:, 0]) == pytest.approx((x.mean() - half, x.mean() + half), abs=0.01)
    assert mean_with_interval(x, 4_000, seed=1)[1:] == pytest.approx(interval(resampled_means(x, 4_000, seed=1)))
