"""Evaluate: `accelerate launch eval_tofu.py --model FOLDER [flags]`. `--help` lists the flags."""

from dualoptim import EvalArgs
from dualoptim.config.cli import main


def evaluate(args: EvalArgs) -> object:
    """Evaluate, and attack if asked."""
    from dualoptim import evaluate as evaluation  # torch and transformers, for which `--help` need not wait

    return evaluation.command(args)


if __name__ == "__main__":
    main(EvalArgs, evaluate)
