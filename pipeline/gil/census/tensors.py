"""The census's cases of torch and torchvision, on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pipeline.gil.census.cases import Call, Case, jpeg, plain

TORCH, VISION = ("torch",), ("torch", "torchvision", "PIL", "numpy")


def cases() -> list[Case]:
    """Return them, from the smallest operation to the logger."""
    return [
        Case("torch: a + b of 16", TORCH, plain(lambda: _add(16))),
        Case("torch: a + b of 1,000,000", TORCH, plain(lambda: _add(1_000_000))),
        Case("torch: matmul of 512x512", TORCH, plain(_matmul)),
        Case("torch: tensor.item()", TORCH, plain(_item)),
        Case("torch: tensor.tolist(), 10,000", TORCH, plain(_tolist)),
        Case("torchvision: decode_jpeg, 500x400", VISION, plain(_decode_jpeg)),
        Case("torch: default_collate, 32 of (3, 64, 64)", TORCH, plain(_collate)),
        Case("torch: DataLoader.__next__, no workers", TORCH, plain(lambda: _data_loader(0))),
        Case("torch: model(x)", TORCH, plain(_forward)),
        Case("torch: loss.backward()", TORCH, plain(lambda: _backward(None))),
        Case(
            "torch: loss.backward(), autograd.Function", TORCH, plain(lambda: _backward(_python_function()))
        ),
        Case("torch: AdamW.step(), for-loop", TORCH, plain(lambda: _optimizer(foreach=False))),
        Case("torch: AdamW.step(), foreach", TORCH, plain(lambda: _optimizer(foreach=True))),
        Case("torch: AdamW.step(), fused", TORCH, plain(lambda: _optimizer(fused=True))),
        Case("TensorBoard: add_scalar", ("torch", "tensorboard"), _tensorboard),
    ]


def _add(size: int) -> Call:
    import torch

    left, right = torch.ones(size), torch.ones(size)
    return lambda: left + right


def _matmul() -> Call:
    import torch

    matrix = torch.randn(512, 512)
    return lambda: matrix @ matrix


def _item() -> Call:
    import torch

    return torch.tensor(1.5).item


def _tolist() -> Call:
    import torch

    return torch.randn(10_000).tolist


def _decode_jpeg() -> Call:
    import torch
    from torchvision.io import decode_jpeg

    data = torch.frombuffer(bytearray(jpeg()), dtype=torch.uint8)
    return lambda: decode_jpeg(data)


def _collate() -> Call:
    import torch
    from torch.utils.data import default_collate

    samples = [(torch.randn(3, 64, 64), index) for index in range(32)]
    return lambda: default_collate(samples)


def _data_loader(num_workers: int) -> Call:
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    dataset = TensorDataset(torch.randn(64_000, 64), torch.randint(0, 10, (64_000,)))
    loader = DataLoader(dataset, batch_size=64, num_workers=num_workers)
    batches = iter(loader)

    def call() -> None:
        nonlocal batches
        try:
            next(batches)
        except StopIteration:
            batches = iter(loader)

    return call


def _model() -> Any:
    import torch

    layers = [part for _ in range(6) for part in (torch.nn.Linear(256, 256), torch.nn.ReLU())]
    return torch.nn.Sequential(*layers, torch.nn.Linear(256, 10))


def _forward() -> Call:
    import torch

    model, inputs = _model(), torch.randn(64, 256)
    return lambda: model(inputs)


def _backward(activation: Any) -> Call:
    """Backward alone, over a graph that is kept."""
    import torch

    model, inputs = _model(), torch.randn(64, 256)
    outputs = inputs
    for layer in model:
        is_replaced = activation is not None and isinstance(layer, torch.nn.ReLU)
        outputs = activation.apply(outputs) if is_replaced else layer(outputs)
    loss = outputs.square().mean()

    def call() -> None:
        model.zero_grad()
        loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]

    return call


def _python_function() -> Any:
    import torch

    class PythonReLU(torch.autograd.Function):
        """A ReLU whose backward is Python."""

        @staticmethod
        def forward(context: Any, inputs: Any) -> Any:
            context.save_for_backward(inputs)
            return inputs.clamp(min=0)

        @staticmethod
        def backward(context: Any, gradient: Any) -> Any:
            (inputs,) = context.saved_tensors
            return gradient * (inputs > 0)

    return PythonReLU


def _optimizer(**options: Any) -> Call:
    import torch

    model = _model()
    model(torch.randn(64, 256)).square().mean().backward()
    step = torch.optim.AdamW(model.parameters(), **options).step
    return lambda: step()


@contextmanager
def _tensorboard() -> Iterator[Call]:
    import tempfile

    from torch.utils.tensorboard import SummaryWriter

    with tempfile.TemporaryDirectory() as folder, SummaryWriter(folder) as writer:
        yield lambda: writer.add_scalar("loss", 0.25, 1)
