"""The MONAI Label bridge. Only the modules below this one import monailabel; this package itself stays light."""

from samadapt.server.launch import command, environment, run

__all__ = ["command", "environment", "run"]
