"""Starting the server: the same ``monailabel start_server`` that people type, on the loopback interface by default."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from samadapt.config import AppConfig
from samadapt.data.dicom import is_dicom
from samadapt.data.volume import image_suffix
from samadapt.dicomweb.child import LIBRARY, holds_dicom
from samadapt.errors import InputError, StateError

APP_DIR = Path(__file__).resolve().parents[3] / "apps" / "samadapt"


_NEEDS_RECIPE = {"recipe", "blocks", "form", "clip", "ladder_weights", "synthetic_share"}
"""Settings that not every recipe takes."""


def command(
    studies: str | Path, host: str = "127.0.0.1", port: int = 8000, conf: Mapping[str, str] | None = None
) -> list[str]:
    """The command line that starts the server with this Python.

    Not the script ``monailabel``: that one takes whichever ``python`` is first on PATH and splits arguments at spaces.

    Raises:
        ConfigError: ``conf`` has an unknown key or a bad value, or values that do not go together.
        InputError: the app is not where the library expects it.
    """
    if not (APP_DIR / "main.py").is_file():
        raise InputError("the app is missing", where=APP_DIR, remedy="Run from a complete checkout of the project.")
    config = AppConfig.from_strings(conf or {})
    if conf and not _NEEDS_RECIPE.isdisjoint(conf):
        from samadapt import recipes  # torch: seconds, which a server without these settings need not wait for

        recipes.check(config)
    words = [sys.executable, "-m", "monailabel.main", "start_server", "--app", str(APP_DIR), "--studies", str(studies)]
    words += ["--host", host, "--port", str(port)]
    for key, value in (conf or {}).items():
        words += ["--conf", key, str(value)]
    return words


def is_free(host: str, port: int) -> bool:
    """Whether a server could listen there now."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError:
        return False
    return True


def require_free(host: str, port: int) -> None:
    """Refuse an address that is taken or is not this machine's, before a server spends seconds to find out.

    Raises:
        StateError: it cannot be listened on.
    """
    if not is_free(host, port):
        raise StateError(
            "cannot be listened on: the port is taken, or the host is none of this machine's",
            where=f"{host}:{port}",
            remedy="Choose another --port, or stop the program that uses it.",
        )


def environment() -> dict[str, str]:
    """This process's environment, with this Python's programs (dcmqi's among them) first on PATH, and this library."""
    found = {"PATH": str(Path(sys.executable).parent), "PYTHONPATH": str(LIBRARY)}
    paths = {name: os.pathsep.join(filter(None, [first, os.environ.get(name)])) for name, first in found.items()}
    return {**os.environ, **paths}


def run(
    studies: str | Path,
    host: str = "127.0.0.1",
    port: int = 8000,
    conf: Mapping[str, str] | None = None,
    variables: Mapping[str, str] | None = None,
) -> NoReturn:
    """Become the server: this process is replaced by it, so Ctrl-C, kill and the exit code are the server's own.

    Args:
        studies, host, port, conf: as for ``command``.
        variables: further environment variables.
    """
    words = command(studies, host, port, conf)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(words[0], words, {**environment(), **(variables or {})})


def needs_dicomweb(folder: Path) -> bool:
    """Whether the host would see nothing of what a folder holds: DICOM files, and no image file beside them."""
    files = any(path.is_file() and image_suffix(path.name) and not is_dicom(path) for path in folder.iterdir())
    return not files and holds_dicom(folder)
