"""The census's cases of Ray and vLLM: who waits for another process, and who computes in this one."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.gil.census.cases import Call, Case

RAY, VLLM = ("ray",), ("vllm", "torch")
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 256,
    "torch_dtype": "float32",
}


def cases() -> list[Case]:
    """Return them; they are left out where Ray or vLLM is not installed."""
    return [
        Case("ray.get, waiting for 10 ms", RAY, lambda: _ray(_get_sleep)),
        Case("ray.wait, for 10 ms", RAY, lambda: _ray(_wait_sleep)),
        Case("ray.get, a small result", RAY, lambda: _ray(_get_small)),
        Case("ray.get, 20,000 dicts to deserialise", RAY, lambda: _ray(_get_dicts)),
        Case("ray.get, a local array of 10 MB", RAY, lambda: _ray(_get_array)),
        Case("vLLM: generate, engine in this process", VLLM, lambda: _vllm("0", _generate)),
        Case("vLLM: step, engine in this process", VLLM, lambda: _vllm("0", _step)),
        Case("vLLM: generate, engine in a process", VLLM, lambda: _vllm("1", _generate)),
        Case("vLLM: step, engine in a process", VLLM, lambda: _vllm("1", _step)),
    ]


@contextmanager
def _ray(make: Any) -> Iterator[Call]:
    # These two keep Ray from the network: no usage report, and an address of this machine alone.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    import ray

    was_running = ray.is_initialized()
    if not was_running:
        ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        yield make(ray)
    finally:
        if not was_running:
            ray.shutdown()


class _Actor:
    """Sleeps, answers, and makes many small objects, in a process of its own."""

    def sleep(self) -> None:
        time.sleep(0.01)

    def small(self) -> int:
        return 1

    def dicts(self) -> Any:
        return [{"id": number, "score": 0.5} for number in range(20_000)]


def _actor(ray: Any) -> Any:
    actor = ray.remote(_Actor).remote()
    ray.get(actor.small.remote())
    return actor


def _get_sleep(ray: Any) -> Call:
    actor = _actor(ray)
    return lambda: ray.get(actor.sleep.remote())


def _wait_sleep(ray: Any) -> Call:
    actor = _actor(ray)
    return lambda: ray.wait([actor.sleep.remote()], timeout=1)


def _get_small(ray: Any) -> Call:
    actor = _actor(ray)
    return lambda: ray.get(actor.small.remote())


def _get_dicts(ray: Any) -> Call:
    reference = _actor(ray).dicts.remote()
    return lambda: ray.get(reference)


def _get_array(ray: Any) -> Call:
    import numpy as np

    reference = ray.put(np.zeros(10_000_000 // 8))
    return lambda: ray.get(reference)


@contextmanager
def _vllm(multiprocessing: str, make: Any) -> Iterator[Call]:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = multiprocessing
    for name, value in (
        ("VLLM_NO_USAGE_STATS", "1"),
        ("VLLM_LOGGING_LEVEL", "ERROR"),
        ("HF_HUB_OFFLINE", "1"),
    ):
        os.environ.setdefault(name, value)
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(MODEL))
        engine = LLM(
            model=folder,
            load_format="dummy",  # random weights: nothing is downloaded
            skip_tokenizer_init=True,
            dtype="float32",
            enforce_eager=True,
            max_model_len=128,
            max_num_seqs=16,
        )
        try:
            yield make(engine)
        finally:
            _shut_down(engine)


def _sampling() -> Any:
    from vllm import SamplingParams

    return SamplingParams(max_tokens=16, temperature=1.0, ignore_eos=True, detokenize=False)


PROMPT = {"prompt_token_ids": list(range(1, 17))}


def _generate(engine: Any) -> Call:
    sampling = _sampling()
    return lambda: engine.generate([PROMPT] * 8, sampling, use_tqdm=False)


def _step(engine: Any) -> Call:
    core, sampling = engine.llm_engine, _sampling()
    numbers = iter(range(10**9))

    def call() -> None:
        if not core.has_unfinished_requests():
            for _ in range(8):
                core.add_request(str(next(numbers)), PROMPT, sampling)
        core.step()

    return call


def _shut_down(engine: Any) -> None:
    core = engine.llm_engine.engine_core
    core.shutdown()
