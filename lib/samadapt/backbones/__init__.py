"""Frozen SAM-family models: ``load(name)`` gives a module with ``embed(images)``.

Importing this package reads no weights and opens no connection.
"""

from samadapt.backbones.base import EMBED_DIM, AttentionLayer, Backbone, QKVLayout
from samadapt.backbones.registry import BackboneSpec, build, load, names, register, spec

__all__ = [
    "EMBED_DIM",
    "AttentionLayer",
    "Backbone",
    "BackboneSpec",
    "QKVLayout",
    "build",
    "load",
    "names",
    "register",
    "spec",
]
