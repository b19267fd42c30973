"""Files whose pickle would run code: it makes another file, by which the tests see that it ran."""

import io
import pickle
import tarfile

import torch


class Sneaky:
    """A pickle of it makes a file when it is read."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return open, (str(self.trace), "w")


def sneaky_files(trace):
    """Files whose pickle would run code, by names that say how they are made."""
    content = {"head.weight": Sneaky(trace)}
    for name, new in (("zip", True), ("legacy", False)):
        with io.BytesIO() as file:
            torch.save(content, file, _use_new_zipfile_serialization=new)
            yield name, file.getvalue()
    yield "plain pickle", pickle.dumps(content)
    with io.BytesIO() as file:
        with tarfile.open(fileobj=file, mode="w") as tar:
            for name in ("sys_info", "pickle", "storages", "tensors"):
                record = tarfile.TarInfo(name)
                data = pickle.dumps(Sneaky(trace))
                record.size = len(data)
                tar.addfile(record, io.BytesIO(data))
        yield "tar", file.getvalue()
