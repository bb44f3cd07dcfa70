"""samadapt adapts Segment-Anything models to a hospital's own images while people label them."""

__version__ = "0.1.0"
