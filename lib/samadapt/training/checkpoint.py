"""Training state on disk, so that a killed training goes on where it was. safetensors, never pickle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from samadapt.files import atomic_path

FILE = "checkpoint.safetensors"
"""Its name in a training's folder."""

_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def save(
    path: Path,
    parameters: dict[str, nn.Parameter],
    buffers: dict[str, Tensor],
    optimizer: Optimizer,
    state: dict[str, Any],
) -> None:
    """Write the parameters, AdamW's moments of each, what else training changes (the statistics of norms), and
    ``state`` (JSON), atomically."""
    tensors = {f"parameter.{name}": p.detach().cpu().contiguous() for name, p in parameters.items()}
    tensors |= {f"buffer.{name}": buffer.cpu().contiguous() for name, buffer in buffers.items()}
    for name, parameter in parameters.items():
        for moment in _MOMENTS:
            if moment in optimizer.state.get(parameter, {}):
                tensors[f"{moment}.{name}"] = optimizer.state[parameter][moment].cpu().contiguous()
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"state": json.dumps(state)})


def peek(path: Path) -> dict[str, Any] | None:
    """The JSON state of a checkpoint; None where there is none that can be read."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            return json.loads((file.metadata() or {})["state"])
    except (SafetensorError, OSError, KeyError, ValueError):
        return None


def restore(path: Path, parameters: dict[str, nn.Parameter], buffers: dict[str, Tensor], optimizer: Optimizer) -> None:
    """Copy back what ``save`` wrote; it must be of the same model and optimiser."""
    with safe_open(path, framework="pt") as file, torch.no_grad():
        names = set(file.keys())
        for name, buffer in buffers.items():
            buffer.copy_(file.get_tensor(f"buffer.{name}"))
        for name, parameter in parameters.items():
            parameter.copy_(file.get_tensor(f"parameter.{name}"))
            moments = {m: file.get_tensor(f"{m}.{name}") for m in _MOMENTS if f"{m}.{name}" in names}
            if moments:
                optimizer.state[parameter] = {m: tensor.to(parameter.device) for m, tensor in moments.items()}
