"""Label names as vectors, from text encoders that never learn and need no network."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import Tensor

from samadapt.backbones.weights import WeightsSource, resolve
from samadapt.data.labels import same_name
from samadapt.errors import WeightsError

_PACKAGE = "wordllama"
_INSTALL = "wordllama==0.2.0"

_VECTORS = WeightsSource(
    "wordllama_l2_supercat_256.safetensors",
    "64b47a2dc493cb8e85944076601189739852d7b64e0e1eedcb1937a251cd9fd5",
    package=_PACKAGE,
    package_path="weights/l2_supercat_256.safetensors",
    install=_INSTALL,
)
_TOKENIZER = WeightsSource(
    "wordllama_l2_supercat_tokenizer.json",
    "bf467c9e0f536bda271283c6ef85eb1a943e3196b621c8a912d64953b205df83",
    package=_PACKAGE,
    package_path="tokenizers/l2_supercat_tokenizer_config.json",
    install=_INSTALL,
)


class TextEncoder(ABC):
    """Names -> vectors. The vector of a name depends on that name alone, and is computed once in a process.

    Case, surplus white space and underscores do not count.

    Class attributes:
        width: d, length of a vector.
    """

    width: ClassVar[int]

    def __init__(self) -> None:
        self._known: dict[str, Tensor] = {}

    def encode(self, names: Sequence[str]) -> Tensor:
        """K names -> (K,d) float32 on the CPU.

        Raises:
            WeightsError: the encoder's files are missing, or not what they should be.
        """
        texts = [same_name(name.replace("_", " ")) or name for name in names]
        for text in texts:
            if text not in self._known:
                self._known[text] = self._vector(text)
        return torch.stack([self._known[text] for text in texts])

    @abstractmethod
    def _vector(self, text: str) -> Tensor:
        """(d,) float32 on the CPU."""


class WordVectors(TextEncoder):
    """The mean of static vectors of a name's tokens, scaled to a root mean square of 1.

    Vectors and tokenizer are WordLlama's ("l2_supercat", 256 dimensions, 32,000 tokens; any script, through bytes where
    need be), which come inside the package of that name. Its code is not run: importing it reconfigures logging.
    """

    width = 256

    def _vector(self, text: str) -> Tensor:
        tokens = _tokenizer().encode(text, add_special_tokens=False).ids
        with safe_open(resolve(_VECTORS).path, framework="np") as file:
            table = file.get_slice("embedding.weight")
            mean = np.mean([table[token : token + 1][0].astype(np.float32) for token in tokens], axis=0)
        return torch.from_numpy(mean / np.sqrt(np.mean(mean**2)))


class ClipText(TextEncoder):
    """The text encoder of CLIP ViT-B/32 (Radford et al., ICML 2021), as S-SAM uses it: the bare name, no template.

    Args:
        folder: a copy of Hugging Face's openai/clip-vit-base-patch32 with its tokenizer and with weights as
            safetensors; None stands for a folder that nobody gave.
    """

    width = 512

    def __init__(self, folder: str | None) -> None:
        super().__init__()
        self._folder = folder

    @torch.no_grad()
    def _vector(self, text: str) -> Tensor:
        tokenizer, model = self._parts
        tokens = tokenizer(text, truncation=True, return_tensors="pt")
        return model(**tokens).text_embeds[0].float()

    @functools.cached_property
    def _parts(self) -> tuple[Any, Any]:
        """Tokenizer and model."""
        from transformers import CLIPTextModelWithProjection, CLIPTokenizer  # takes seconds

        remedy = "Give the folder of a copy of openai/clip-vit-base-patch32: tokenizer files and model.safetensors."
        if self._folder is None:
            raise WeightsError("label names are to be read by CLIP ViT-B/32, which is not given", remedy=remedy)
        folder = Path(self._folder).expanduser()
        if not folder.is_dir():
            raise WeightsError("no such folder with CLIP's text encoder", where=folder, remedy=remedy)
        try:
            tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
            model = CLIPTextModelWithProjection.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise WeightsError(f"CLIP's text encoder cannot be read ({error})", where=folder, remedy=remedy) from error
        if model.config.projection_dim != self.width:
            raise WeightsError(f"gives vectors of {model.config.projection_dim}, not 512", where=folder, remedy=remedy)
        return tokenizer, model.eval()


@functools.cache
def text_encoder(kind: str, clip: str | None = None) -> TextEncoder:
    """The text encoder "words" or "clip", the same one for everybody in a process; ``clip`` is its folder."""
    return ClipText(clip) if kind == "clip" else WordVectors()


@functools.cache
def _tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(resolve(_TOKENIZER).path))
