"""What does a checkpoint of a 100 MB model cost the loop, and whom does writing it take the GIL from?

Baseline: the same run without checkpoints. Unit: ms, per save (stall, write) and per step beside a write.
Workload: 25 million float32 parameters (100 MB), with SGD (100 MB of state in all) and with AdamW (300 MB),
one intra-op thread. Bounds: one copy of the state in memory, and one write of it with an fsync.

    python -m benchmarks.checkpoint [--saves 9] [--device auto]

The stall is the time the loop waits for the snapshot; in textbook it waits for the write as well. The first
save, whose memory is fresh, is told apart. GIL: the share of a write during which the writing
thread holds it, sampled by this project's own account.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import describe_machine, median_interval
from pipeline import Trainer, gil_account, stage
from pipeline.checkpoint import pack, write_file
from pipeline.device import select_backend

WIDTH, LAYERS = 1250, 16  # 16 × 1250² = 25 million
STEPS_PER_SAVE = 24
MAKERS: dict[str, Any] = {
    "SGD, 100 MB": lambda parameters: torch.optim.SGD(parameters, 1e-4),
    "AdamW, 300 MB": lambda parameters: torch.optim.AdamW(parameters, 1e-4),
}


def make_model() -> torch.nn.Module:
    """Return a model of 100 MB."""
    return torch.nn.Sequential(*[torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)])


def run(folder: Path, maker: Any, schedule: str, device: str, num_saves: int) -> Any:
    """Train with a checkpoint every few steps; none if `num_saves` is 0."""
    model = make_model()
    steps = STEPS_PER_SAVE * max(num_saves, 3)
    batches = [(torch.randn(4, WIDTH), torch.randn(4, WIDTH)) for _ in range(steps)]
    trainer = Trainer(
        run_dir=folder, schedule=schedule, device=device, enable_progress_bar=False, gil="off",
        enable_checkpointing=num_saves > 0, checkpoint_every_n_steps=STEPS_PER_SAVE, keep_last=1,
        max_epochs=None, max_steps=steps,
    )  # fmt: skip
    return trainer.fit(model, maker(model.parameters()), batches, loss_fn=torch.nn.functional.mse_loss)


def show(name: str, values: list[float]) -> None:
    """Print a median with its interval."""
    middle, low, high = median_interval([each * 1e3 for each in values])
    print(f"  {name:34} {middle:8.1f} ms [{low:.1f}, {high:.1f}]")


def bounds(state: dict[str, torch.Tensor], folder: Path, num: int) -> None:
    """Print what a copy into memory that was used before, and a plain write, take."""
    copies = {name: torch.empty_like(each, device="cpu") for name, each in state.items()}
    copy_s, write_s = [], []
    for _ in range(num):
        began_s = time.perf_counter()
        for name, each in state.items():
            copies[name].copy_(each)
        copy_s.append(time.perf_counter() - began_s)
        began_s = time.perf_counter()
        with open(folder / "plain", "wb") as file:
            for each in copies.values():
                file.write(memoryview(each.reshape(-1).view(torch.uint8).numpy()))
            os.fsync(file.fileno())
        write_s.append(time.perf_counter() - began_s)
    show("bound: copy in memory", copy_s)
    show("bound: plain write and fsync", write_s)


def held_while_writing(state: dict[str, torch.Tensor], folder: Path, num: int) -> None:
    """Print the share of a write in which the writing thread holds the GIL, and the pickle's beside it."""
    tensors: dict[str, torch.Tensor] = {}
    structure = pack({"model": state}, tensors)
    for name, write in {
        "this file": lambda: write_file(folder / "a.safetensors", tensors, structure),
        "torch.save and fsync": lambda: save_with_torch(state, folder / "a.pt"),
    }.items():
        writing, times = stage(f"write {name}"), []

        def work(write: Any = write, writing: Any = writing, times: list[float] = times) -> None:
            for _ in range(num):
                began_s = time.perf_counter()
                with writing:
                    write()
                times.append(time.perf_counter() - began_s)

        with gil_account() as account:
            thread = threading.Thread(target=work, name="writing")
            thread.start()
            thread.join()
        held = account.report().stage("writing", f"write {name}").held_ratio
        write_s = statistics.median(times)
        share = f"{held:.1%} of it with the GIL: {held * write_s * 1e3:.1f} ms"
        print(f"  {name:34} {write_s * 1e3:8.1f} ms, {share}")


def save_with_torch(state: dict[str, torch.Tensor], path: Path) -> None:
    """Write as most trainers do, and flush."""
    with open(path, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--saves", type=int, default=9)
    parser.add_argument("--device", default="auto")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    device = str(select_backend(asked.device).device)
    print(f"{describe_machine()}, device {device}")
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-"))
    for name, maker in MAKERS.items():
        print(name)
        plain = run(folder / f"{name} plain", maker, "overlap", device, 0)
        show("step without checkpoints", [plain.train_s / plain.num_steps])
        for schedule in ("overlap", "textbook"):
            result = run(folder / f"{name} {schedule}", maker, schedule, device, asked.saves)
            first, *others = result.saves
            show(f"{schedule}: stall, first save", [first.stall_s])
            show(f"{schedule}: stall", [each.stall_s for each in others])
            show(f"{schedule}: write", [each.write_s for each in others])
            show(f"{schedule}: step, between saves", [result.train_s / result.num_steps])
            shutil.rmtree(folder / f"{name} {schedule}")
        model = make_model().to(device)
        bounds(dict(model.state_dict()), folder, asked.saves)
    print("the model alone, written by a thread while another sleeps")
    held_while_writing(make_model().state_dict(), folder, asked.saves)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
