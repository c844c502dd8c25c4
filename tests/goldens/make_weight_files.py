"""Writes files/*.pth with torch itself, in both of its formats, and what they hold as files/*.npz.

Run it where torch is: python tests/goldens/make_weight_files.py
"""

import argparse
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch

FOLDER = Path(__file__).parent / "files"


def main():
    torch.manual_seed(0)
    FOLDER.mkdir(exist_ok=True)
    weights = state_dict()
    checkpoint = {
        "model": weights,
        "optimizer": optimizer_state(),
        "lr_scheduler": {"step": 3, "values": [1e-4, 1e-5]},
        "config": {"image_res": 256, "train_file": ["a.json"], "alpha": np.float64(0.4)},
        "args": argparse.Namespace(output_dir=Path("out"), device=torch.device("cpu"), lr=1e-4),
        "epoch": 29,
    }
    torch.save(checkpoint, FOLDER / "checkpoint_zip.pth")
    torch.save(checkpoint, FOLDER / "checkpoint_stream.pth", _use_new_zipfile_serialization=False)
    expected = {name: as_numpy(tensor) for name, tensor in weights.items()}
    np.savez(FOLDER / "checkpoint.npz", **expected)
    for name in ("checkpoint_zip.pth", "checkpoint_stream.pth", "checkpoint.npz"):
        print(f"{name}: {(FOLDER / name).stat().st_size:,} bytes")


def state_dict():
    shared = torch.randn(7, 5)
    weights = OrderedDict(
        float32=torch.randn(3, 5),
        float64=torch.randn(2, 3, dtype=torch.float64),
        float16=torch.randn(11).half(),
        bfloat16=torch.randn(13).bfloat16(),
        int64_scalar=torch.tensor(2**40 + 1),
        int32=torch.arange(-2, 3, dtype=torch.int32),
        int16=torch.arange(-2, 3, dtype=torch.int16),
        int8=torch.arange(-2, 3, dtype=torch.int8),
        uint8=torch.arange(250, 255, dtype=torch.uint8),
        bool=torch.tensor([True, False, True]),
        empty=torch.empty(0, 3),
        transposed=torch.randn(5, 7).t(),
        every_second=torch.arange(10.0)[1::2],
        expanded=torch.arange(3.0).expand(2, 3),
        position_ids=torch.arange(17).expand((1, -1)),
        whole=shared,
        rows_of_whole=shared[2:5],
        tied=shared,
        parameter=torch.nn.Parameter(torch.randn(2, 2)),
    )
    weights._metadata = OrderedDict({"": {"version": 1}})  # as nn.Module.state_dict leaves it
    return weights


def optimizer_state():
    """AdamW's after a step, and a kind of tensor that no weights have."""
    weight = torch.nn.Parameter(torch.randn(3, 3))
    optimizer = torch.optim.AdamW([weight])
    weight.square().sum().backward()
    optimizer.step()
    return {**optimizer.state_dict(), "complex": torch.zeros(2, dtype=torch.complex64)}


def as_numpy(tensor):
    tensor = tensor.detach()
    half = tensor.dtype in (torch.float16, torch.bfloat16)
    return (tensor.float() if half else tensor).numpy()


if __name__ == "__main__":
    main()
