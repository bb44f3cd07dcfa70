"""``python -m samadapt.dicomweb FOLDER``: the folder over DICOMweb on the loopback interface, until Ctrl-C."""

from __future__ import annotations

import argparse
import logging
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pydicom
import uvicorn
from tqdm import tqdm

from samadapt.dicomweb.app import ROOT, Archive, ConvertedArchive, application
from samadapt.orphans import when_orphaned

logger = logging.getLogger("samadapt.dicomweb")

HOST = "127.0.0.1"
LINE_EVERY_S = 5.0


def main() -> None:
    arguments = _parser().parse_args()
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="[dicomweb] %(levelname)s %(message)s")
    if not arguments.folder.is_dir():
        sys.exit(f"{arguments.folder}: no such folder. Name the folder that holds the DICOM files.")
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.bind((HOST, arguments.port))
    listening.listen(128)  # from here on who connects waits for the answer instead of being turned away
    # Real files break small rules, above all those on lengths. Their values are shown as they are, not left out.
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    pydicom.config.settings.writing_validation_mode = pydicom.config.IGNORE
    kind, unit = (ConvertedArchive, "volume") if arguments.volumes else (Archive, "file")
    archive = kind(arguments.folder, _progress(unit))
    archive.look_in_background()
    config = uvicorn.Config(application(archive), log_level="warning", access_log=False)
    server = uvicorn.Server(config)
    if arguments.parent:
        when_orphaned(arguments.parent, lambda: setattr(server, "should_exit", True))
    print(f"http://{HOST}:{listening.getsockname()[1]}{ROOT}", flush=True)
    server.run(sockets=[listening])


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m samadapt.dicomweb", description=__doc__)
    made.add_argument("folder", type=Path)
    made.add_argument("--volumes", action="store_true", help="serve its NIfTI and other volumes, converted to DICOM")
    made.add_argument("--port", type=int, default=0, help="default: any free one; the address is printed")
    made.add_argument("--parent", type=int, help="end when this process, which has started this one, has ended")
    return made


def _progress(unit: str) -> Callable[[int, int], None]:
    """A bar where standard error is a terminal, a line every few seconds where it is a log; nothing for small work."""
    started = said = time.monotonic()
    bar: tqdm | None = None

    def show(done: int, total: int) -> None:
        nonlocal bar, said, started
        now = time.monotonic()
        if bar is None and sys.stderr.isatty() and now - started > 1 and done < total:
            bar = tqdm(total=total, unit=unit, desc="DICOM for viewers", file=sys.stderr)
        if bar is not None:
            bar.update(done - bar.n)
        elif now - said > LINE_EVERY_S and done < total:
            said = now
            logger.info("%d of %d %ss are ready", done, total, unit)
        if done == total and bar is not None:
            bar.close()
            bar = None

    return show


if __name__ == "__main__":
    main()
