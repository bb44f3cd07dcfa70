"""What every head promises: class logits from an embedding, and masks for prompts where it takes any."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

from segment_anything.modeling import PromptEncoder
from torch import Tensor, nn

from samadapt.backbones.base import Backbone
from samadapt.data.labels import LabelMap
from samadapt.parts import Part


class Head(nn.Module):
    """Turns embeddings into class logits.

    Attributes:
        prompts: what it answers: "none" (classes without any prompt), "points", "box", "text".
        reads_images: whether it takes the images (B,3,S,S) in place of embeddings, so that the encoder never runs.
        pretrained: names of parameters of a transformer that starts as the base's; they learn at a rate of their own.
    """

    prompts: tuple[str, ...] = ("none",)
    reads_images = False
    pretrained: frozenset[str] = frozenset()

    def class_logits(self, embeddings: Tensor, prompt_encoder: PromptEncoder) -> Tensor:
        """(B,256,g,g) -> (B,K+1,4g,4g) logits, background first. No click or box is used."""
        raise NotImplementedError

    def prompt_masks(
        self, embeddings: Tensor, sparse: Tensor, dense: Tensor, prompt_encoder: PromptEncoder, kept: slice
    ) -> tuple[Tensor, Tensor]:
        """Masks for encoded prompts; only a head whose ``prompts`` name "box" has them.

        Args:
            embeddings: (N,256,g,g), or (1,256,g,g) shared by all N prompts.
            sparse: (N,T,256) encoded points and boxes.
            dense: (N,256,g,g) encoded mask prompts, or the no-mask embedding.
            prompt_encoder: the base model's.
            kept: which of SAM's masks are wanted: 0 is the single mask, 1..3 the multimask.

        Returns:
            Logits (N,M,4g,4g) and predicted IoU (N,M) of the M masks kept.
        """
        raise NotImplementedError

    def require_complete(self) -> None:
        """Nothing, unless a file is missing without which it answers nothing.

        Raises:
            WeightsError: which one.
        """

    def copied(self) -> set[str]:
        """Names of tensors that are still byte for byte the base's and never learn, so a model file leaves them out."""
        return set()


@dataclass(frozen=True)
class HeadConfig(Part):
    """Which head, and how it learns. A subclass is the configuration of one kind."""

    @abstractmethod
    def build(self, backbone: Backbone, labels: LabelMap, seed: int) -> Head:
        """A new head for ``labels`` on ``backbone``'s embeddings; exactly what it learns requires gradients.

        Args:
            backbone: its decoder may be copied; it is not changed.
            labels: foreground classes, in the order of the logits.
            seed: of every random start.
        """
