"""`python -m pipeline.checkpoint export CHECKPOINT WEIGHTS.safetensors`: the bare weights, for others."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from pipeline.checkpoint import load_weights, write_file
from pipeline.errors import PipelineError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.checkpoint")
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser(
        "export", help="write a checkpoint's weights alone, the average if there is one"
    )
    export.add_argument("checkpoint", type=Path)
    export.add_argument("weights", type=Path, help="a .safetensors file; written anew")
    asked = parser.parse_args(arguments)
    try:
        found = load_weights(asked.checkpoint)
        weights = {name: each for name, each in found.items() if isinstance(each, torch.Tensor)}
        num_bytes = write_file(asked.weights, weights)
    except (PipelineError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{len(weights)} tensors, {num_bytes:,} bytes: {asked.weights}")
    if left_out := sorted(found.keys() - weights.keys()):
        print(f"left out, as it is no tensor: {', '.join(left_out)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
