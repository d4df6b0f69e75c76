"""What does a thread of plain Python do to a train step? Run it under the account:

    python -m pipeline.gil run benchmarks/rival.py

Eight steps of an MLP with AdamW beside a thread that parses JSON. Whether each operation loses the
GIL depends on how fast the other thread wakes, so a step takes milliseconds or a second.
"""

from __future__ import annotations

import json
import threading
import time

import torch


def parse(is_over: threading.Event) -> None:
    """Parse JSON until it is over."""
    text = json.dumps(list(range(2000)))
    while not is_over.is_set():
        json.loads(text)


def train(num_steps: int) -> float:
    """Return the time of a step, in milliseconds."""
    layers = [part for _ in range(6) for part in (torch.nn.Linear(256, 256), torch.nn.ReLU())]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(256, 10))
    optimizer = torch.optim.AdamW(model.parameters())
    inputs, target = torch.randn(64, 256), torch.randint(0, 10, (64,))
    began_s = time.perf_counter()
    for _ in range(num_steps):
        torch.nn.functional.cross_entropy(model(inputs), target).backward()
        optimizer.step()
        optimizer.zero_grad()
    return 1e3 * (time.perf_counter() - began_s) / num_steps


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(3)
    print(f"alone: {train(50):.1f} ms a step")
    over = threading.Event()
    rival = threading.Thread(target=parse, args=(over,), name="tokenizer")
    rival.start()
    print(f"beside a thread that parses JSON: {train(8):.1f} ms a step")
    over.set()
    rival.join()
