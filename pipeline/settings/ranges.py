"""What is out of range among the settings, or contradicts another."""

from __future__ import annotations

from typing import Any


def range_problems(found: dict[str, Any]) -> list[str]:
    """Say what is out of range among the settings whose types are right."""
    problems = [
        f"{name} must be {least} or more, got {value}."
        for name, least in _LEAST.items()
        if (value := found.get(name)) is not None and not value >= least
    ]
    if found.get("max_epochs") is not None and found.get("max_steps") is not None:
        problems.append(
            f"max_epochs={found['max_epochs']} and max_steps={found['max_steps']} contradict: each says "
            "when to stop. Give one, and set the other to null (None)."
        )
    if found.get("schedule") == "textbook" and found.get("placement", "auto") != "auto":
        problems.append(
            f"schedule=textbook makes batches on the loop thread, placement={found['placement']} elsewhere. "
            "Leave one of them at auto."
        )
    if found.get("schedule") == "textbook" and found.get("measure_gain"):
        problems.append(
            "measure_gain=true compares textbook with overlap, and schedule=textbook has no overlap. Set "
            "schedule=auto."
        )
    if (seed := found.get("seed")) is not None and not 0 <= seed < 1 << 64:
        problems.append(
            f"seed must be between 0 and 2**64 - 1, got {seed}. Use null (None) to take torch's own."
        )
    clip, decay = found.get("gradient_clip_val"), found.get("ema_decay")
    if clip is not None and not clip > 0:
        problems.append(f"gradient_clip_val must be above 0, got {clip}. Use null (None) not to clip.")
    peak = found.get("peak_tflops")
    if peak is not None and not peak > 0:
        problems.append(f"peak_tflops must be above 0, got {peak}. Use null (None) to leave it out.")
    for name in ("checkpoint_every_n_minutes", "max_time"):
        value = found.get(name)
        if value is not None and not (seconds(value) or 0) > 0:
            form = (
                " of seconds, or a text like 01:30:00 or 2:00:00:00 (days first)"
                if name == "max_time"
                else ""
            )
            problems.append(f"{name} must be a number above 0{form}, got {value!r}.")
    stall_s = found.get("stall_timeout_s")
    if stall_s is not None and not stall_s > 0:
        problems.append(f"stall_timeout_s must be above 0, got {stall_s}. Use null (None) to wait for ever.")
    if decay is not None and not 0 < decay < 1:
        problems.append(f"ema_decay must be between 0 and 1, got {decay}.")
    for name in ("limit_train_batches", "limit_val_batches"):
        value = found.get(name)
        if value is not None and not (0 < value <= 1 if isinstance(value, float) else value > 0):
            problems.append(
                f"{name} must be a number of batches (1 or more) or a share of them (a float "
                f"up to 1.0), got {value}."
            )
    return problems


def seconds(time: str | float) -> float | None:
    """Return a time in seconds, given as such or as ``[DD:]HH:MM:SS``; None if it is neither."""
    if not isinstance(time, str):
        return time
    parts = time.split(":")
    if not 3 <= len(parts) <= 4 or not all(part.isdigit() for part in parts):
        return None
    units = (1, 60, 3600, 86400)
    return float(sum(int(part) * unit for part, unit in zip(reversed(parts), units, strict=False)))


_LEAST: dict[str, float] = {
    "max_epochs": 1,
    "max_steps": 1,
    "accumulate_grad_batches": 1,
    "log_every_n_steps": 1,
    "max_log_lag": 1,
    "checkpoint_every_n_steps": 1,
    "keep_last": 1,
    "keep_best": 0,
    "gc_every_n_steps": 1,
    "check_val_every_n_epoch": 1,
    "val_check_interval": 1,
    "num_workers": 0,
    "threads_per_worker": 1,
    "prefetch_depth": 1,
    "max_steps_in_flight": 1,
}
