"""``python -m samadapt``: the same as the command ``samadapt``."""

from samadapt.cli import main

if __name__ == "__main__":
    main()
