"""Unlearn: `accelerate launch train_unlearn.py [flags]`; without flags the built-in demo runs. `--help` lists the flags."""

from dualoptim import UnlearnArgs
from dualoptim.config.cli import main


def unlearn(args: UnlearnArgs) -> object:
    """Run, or with `--dry-run` say what running would take."""
    from dualoptim.unlearn import command  # torch and transformers, for which `--help` need not wait

    return command(args)


if __name__ == "__main__":
    main(UnlearnArgs, unlearn)
