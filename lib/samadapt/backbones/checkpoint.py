"""Reading a weights file and putting it into a backbone, strictly."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from samadapt.errors import WeightsError

# Training scripts save their model beside the optimiser's state, under one of these keys.
WRAPPERS = ("model", "state_dict")


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Tensors by name from a ``.safetensors`` file or from one that ``torch.save`` wrote, on the CPU.

    Nothing in the file is executed: pickled objects other than plain containers of tensors are refused.

    Raises:
        WeightsError: the file is no checkpoint, or holds something else than named tensors.
    """
    try:
        content = load_file(path) if path.suffix == ".safetensors" else _torch_load(path)
    except (SafetensorError, pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, EOFError, ValueError) as error:
        raise WeightsError(
            "not a checkpoint that can be read without executing code from it",
            where=path,
            remedy="Give a .pth/.pt file saved by torch.save as a plain state dict, or a .safetensors file.",
        ) from error
    for wrapper in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise WeightsError(
            "the file holds no state dict (a dictionary of named tensors)",
            where=path,
            remedy=f"Save model.state_dict(), alone or under one of the keys {', '.join(WRAPPERS)}.",
        )
    return content


def _torch_load(path: Path) -> object:
    # Only the zip format, torch's default since 1.6, can be mapped into memory.
    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


def load_strictly(module: nn.Module, state: dict[str, Tensor], *, where: Path, remedy: str) -> None:
    """Copy ``state`` into ``module``; every key and every shape must match.

    Raises:
        WeightsError: naming the missing, unexpected and misshapen keys. ``module`` is then unchanged.
    """
    own = module.state_dict()
    problems = [
        _listing("missing", own.keys() - state.keys()),
        _listing("unexpected", state.keys() - own.keys()),
        _listing(
            "of another shape",
            (
                f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
                for key in own.keys() & state.keys()
                if state[key].shape != own[key].shape
            ),
        ),
    ]
    if any(problems):
        found = "; ".join(filter(None, problems))
        raise WeightsError(f"the checkpoint does not fit, keys {found}", where=where, remedy=remedy)
    module.load_state_dict(state)


def _listing(title: str, keys: Iterable[str], limit: int = 5) -> str:
    keys = sorted(keys)
    if not keys:
        return ""
    rest = f" and {len(keys) - limit} more" if len(keys) > limit else ""
    return f"{title}: {', '.join(keys[:limit])}{rest}"
