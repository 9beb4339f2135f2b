"""Unlearn: `accelerate launch train_unlearn.py [flags]`; without flags the built-in demo runs. `--help` lists the flags."""

from dualoptim import UnlearnArgs, run
from dualoptim.args import main

__all__ = ["UnlearnArgs", "run"]

if __name__ == "__main__":
    main(UnlearnArgs, run)
