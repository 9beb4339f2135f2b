"""Unlearn: `accelerate launch train_unlearn.py [flags]`; without flags the built-in demo runs. `--help` lists the flags."""

from dualoptim import UnlearnArgs, run
from dualoptim.config.args import main

__all__ = ["UnlearnArgs", "run"]


def action(args: UnlearnArgs) -> object:
    """Run, or with `--dry-run` say what running would take."""
    if args.dry_run:
        from dualoptim.memory_plan import dry_run

        return dry_run(args)
    return run(args)


if __name__ == "__main__":
    main(UnlearnArgs, action)
