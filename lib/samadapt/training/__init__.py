"""Adapting a model to labelled cases, and publishing it when it is better."""

from samadapt.training.run import TrainResult, train

__all__ = ["TrainResult", "train"]
