"""The judge: the training loop that everybody writes, in 25 lines, and the models it is tried on."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from pipeline.randomness.seeds import sample_seed, shuffle_generator


def textbook(model, optimizer, epochs_of_batches, *, loss_fn=F.cross_entropy, accumulate=1, clip=None):
    """Fetch, step, `.item()`, one after the other; return the loss of every optimizer step."""
    losses = []
    for batches in epochs_of_batches:
        pending = []

        def update(pending=pending):
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
            losses.append((sum(pending[1:], pending[0]) / len(pending)).item())
            pending.clear()

        for inputs, target in batches:
            loss = loss_fn(model(inputs), target)
            (loss / accumulate if accumulate > 1 else loss).backward()
            pending.append(loss.detach())
            if len(pending) == accumulate:
                update()
        if pending:
            update()
    return losses


def seeded_batches(dataset, *, epochs, batch_size, shuffle=False, drop_last=False, seed=None):
    """Yield each epoch's batches as they are promised: every sample made after seeding torch's generator.

    Without a seed it is what torch was seeded with.
    """
    seed = torch.initial_seed() if seed is None else seed
    for epoch in range(epochs):
        order = list(range(len(dataset)))
        if shuffle:
            order = torch.randperm(len(dataset), generator=shuffle_generator(seed, epoch)).tolist()
        groups = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        if drop_last and len(groups[-1]) < batch_size:
            groups.pop()
        yield (make_batch(dataset, group, seed, epoch) for group in groups)


def make_batch(dataset, indices, seed, epoch):
    """Make one batch, the global generator put back afterwards."""
    state = torch.get_rng_state()
    samples = []
    for index in indices:
        torch.manual_seed(sample_seed(seed, epoch, index))
        samples.append(dataset[index])
    torch.set_rng_state(state)
    return torch.utils.data.default_collate(samples)


def build_model(kind, num_features=6, num_classes=3):
    """Return a small model; dropout and batch norm are what parity is lost by."""
    if kind == "linear":
        return nn.Linear(num_features, num_classes)
    if kind == "dropout":
        return nn.Sequential(
            nn.Linear(num_features, 8), nn.ReLU(), nn.Dropout(0.4), nn.Linear(8, num_classes)
        )
    return nn.Sequential(
        nn.Unflatten(1, (1, num_features)),
        nn.Conv1d(1, 4, 3, padding=1),
        nn.BatchNorm1d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(4 * num_features, num_classes),
    )


def weights(model):
    """Return everything a model has learned."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_weights(left, right):
    """Compare bit for bit."""
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name
