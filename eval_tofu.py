"""Evaluate: `accelerate launch eval_tofu.py --model FOLDER [flags]`. `--help` lists the flags."""

from dualoptim import EvalArgs, evaluate
from dualoptim.args import main

__all__ = ["EvalArgs", "evaluate"]

if __name__ == "__main__":
    main(EvalArgs, evaluate)
