"""Files of tensors: what stands in the way of writing or reading one is said in a sentence that names the file."""

import pytest
import torch
from safetensors.torch import save_file

from smi_fast.data.tensors import new_file, open_tensors


def test_a_new_file_has_the_right_suffix_and_replaces_nothing_unasked(tmp_path):
    path = tmp_path / "a.safetensors"
    assert new_file(str(path), "model", overwrite=False) == path
    path.touch()
    assert new_file(path, "model", overwrite=True) == path
    with pytest.raises(FileExistsError, match=f"^{path} exists already"):
        new_file(path, "model", overwrite=False)
    with pytest.raises(ValueError, match=r"a\.pt: the name of a model must end in \.safetensors$"):
        new_file(tmp_path / "a.pt", "model", overwrite=True)


def test_an_open_file_gives_its_tensors_and_its_header(tmp_path):
    path, tensor = tmp_path / "a.safetensors", torch.arange(3)
    save_file({"x": tensor}, path, {"key": "text"})
    with open_tensors(path, "key", "model") as (file, text):
        assert text == "text"
        assert torch.equal(file.get_tensor("x"), tensor)


def test_whatever_is_wrong_with_a_file_is_said_with_its_name(tmp_path):
    path = tmp_path / "a.safetensors"

    def fails(error, message, key="key", use=lambda file: None):
        with pytest.raises(error, match=f"^{path}: {message}"), open_tensors(path, key, "model") as (file, _):
            use(file)

    def wrong(file):
        raise ValueError("a wrong number")

    fails(FileNotFoundError, "no such file")
    path.write_bytes(b"short")
    fails(ValueError, "not a complete model")
    save_file({"x": torch.arange(3)}, path, {"key": "text"})
    fails(ValueError, 'no "other" in its header, so it is not a model', key="other")
    fails(ValueError, "not a complete model .*does not contain tensor y", use=lambda file: file.get_tensor("y"))
    fails(ValueError, "a wrong number$", use=wrong)
