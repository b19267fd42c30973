"""Which backend an operation takes on which GPU."""

import pytest
import torch
from smi_fast.kernels import attention, backend, class_attention, residual_norm, resolve_backend, triton_status

pytest.importorskip("triton")


@pytest.fixture
def gpus(monkeypatch):
    """Let torch report GPUs of some compute capabilities. Returns the list of the indices that torch is asked about."""
    asked = []

    def install(*capabilities):
        def capability(device):
            asked.append(device.index)
            return capabilities[device.index or 0]

        monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        return asked

    monkeypatch.setattr(backend, "INTERPRETED", False)
    backend._resolved.cache_clear()
    yield install
    backend._resolved.cache_clear()


@pytest.mark.parametrize("capability", [(7, 0), (7, 5)], ids=str)
def test_before_sm_80_auto_is_plain_torch_and_triton_is_refused(capability, gpus):
    gpus(capability)
    assert resolve_backend("auto", torch.device("cuda", 0)) == resolve_backend("torch", torch.device("cuda")) == "torch"
    message = "needs a GPU of compute capability 8.0 or later, and cuda:0 has {}.{}".format(*capability)
    with pytest.raises(ValueError, match=f'^backend "triton" {message}$'):
        resolve_backend("triton", torch.device("cuda", 0))
    assert "is not in use on a GPU" in triton_status()
    assert message in triton_status()


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (12, 0)], ids=str)
def test_from_sm_80_on_auto_is_triton(capability, gpus):
    gpus(capability)
    assert resolve_backend("auto", torch.device("cuda")) == resolve_backend("triton", torch.device("cuda")) == "triton"
    assert triton_status().endswith("is in use on a GPU.")


def test_each_gpu_is_asked_once_for_its_capability(gpus):
    asked = gpus((9, 0), (7, 5))
    for _ in range(3):
        assert [resolve_backend("auto", torch.device("cuda", index)) for index in range(2)] == ["triton", "torch"]
    assert asked == [0, 1]


def test_without_triton_every_device_takes_plain_torch(gpus, monkeypatch):
    gpus((9, 0))
    monkeypatch.setattr(backend, "triton", None)
    assert resolve_backend("auto", torch.device("cuda", 0)) == "torch"
    with pytest.raises(ValueError, match="needs the package triton, which cannot be imported"):
        resolve_backend("triton", torch.device("cuda", 0))


def test_on_a_cpu_triton_needs_its_interpreter(gpus):
    assert resolve_backend("auto", torch.device("cpu")) == "torch"
    with pytest.raises(ValueError, match="needs tensors on a CUDA device, not on 'cpu'; TRITON_INTERPRET=1"):
        resolve_backend("triton", torch.device("cpu"))


def test_a_whole_number_and_its_float_are_the_same_launch():
    """Triton compiles for the type of a number, and the search for a compiled kernel takes 1 and 1.0 for equal."""
    qkv, cu_seqlens = torch.zeros(2, 3, 1, 16, requires_grad=True), torch.tensor([0, 2], dtype=torch.int32)
    with backend.recording() as launches:
        attention(qkv, cu_seqlens, 2, scale=1, backend="triton").sum().backward()
        q, kv = torch.zeros(1, 1, 16, requires_grad=True), torch.zeros(2, 2, 1, 16)
        class_attention(q, kv, cu_seqlens, 2, scale=1, backend="triton").sum().backward()
        residual_norm(qkv.detach(), None, None, 1, backend="triton")
    names = "scale", "scale_log2", "eps"
    numbers = [launch.arguments[name] for launch in launches for name in names if name in launch.arguments]
    assert len(numbers) >= 5
    assert {type(number) for number in numbers} == {float}
