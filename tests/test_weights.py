"""Weights are read from files only, and from finite numbers only."""

import os

import pytest
import torch
from safetensors.torch import save_file

from open_instruct.errors import InputError
from open_instruct.model.weights import read_tensors


def test_what_is_no_file_is_refused_and_a_file_is_read(tmp_path):
    """Opening a pipe would wait for ever."""
    path = tmp_path / "weights.safetensors"
    for make, reason in ((os.mkfifo, "a pipe or a device"), (os.mkdir, "a folder")):
        make(path)
        with pytest.raises(InputError, match=reason):
            read_tensors(path, "the weights", "give others")
        path.rmdir() if path.is_dir() else path.unlink()
    save_file({"a": torch.ones(2)}, path)
    assert read_tensors(path, "the weights", "give others")["a"].tolist() == [1, 1]
