"""Evaluate: `accelerate launch eval_tofu.py --model FOLDER [flags]`. `--help` lists the flags."""

from dualoptim.config.args import EvalArgs, main
from dualoptim.evaluate import evaluate

__all__ = ["EvalArgs", "evaluate"]

if __name__ == "__main__":
    main(EvalArgs, evaluate)
