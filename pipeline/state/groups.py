"""What an optimizer trains, by name: its groups of parameters, and which are frozen, as a checkpoint has it.

Callbacks change both while a run is under way: they unfreeze a backbone and add its group, or let go of one.
A resumed run begins with the groups that its optimizer was made with.
"""

from __future__ import annotations

from typing import Any

import torch

from pipeline.state.naming import named_parameters, plain_names


def describe(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the names in each group, None for what the model does not have; what is frozen, or in eval mode.

    Costs some 2 µs a parameter and a module, at each checkpoint.
    """
    modules = dict(model.named_modules())
    return {
        "groups": _names(model, optimizer),
        "frozen": [name for name, each in named_parameters(model).items() if not each.requires_grad],
        "in_eval": [
            plain for plain, name in plain_names(model, modules).items() if not modules[name].training
        ],
    }


def restore(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    found: dict[str, Any],
    saved: list[dict[str, Any]],
) -> None:
    """Freeze and group a model's parameters as `describe` found them.

    Args:
        model: Of the run that is resumed.
        optimizer: Its groups may be those of the start, or have been changed by callbacks already.
        found: What `describe` returned.
        saved: The optimizer's own ``param_groups`` then; made use of for a group that is not there now.
    """
    frozen, in_eval = set(found["frozen"]), set(found["in_eval"])
    for name, parameter in named_parameters(model).items():
        if parameter.requires_grad == (name in frozen):
            parameter.requires_grad_(name not in frozen)
    modules = dict(model.named_modules())
    for plain, name in plain_names(model, modules).items():
        if modules[name].training == (plain in in_eval):
            modules[name].training = plain not in in_eval
    if _names(model, optimizer) != found["groups"]:
        wanted = _parameters(model, optimizer, found["groups"])
        if wanted is not None:
            _regroup(optimizer, wanted, saved)


def without_wrappers(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> dict[str, Any]:
    """Return an optimizer's state, the names that it may have of its parameters under plain ones."""
    if not any("param_names" in group for group in state["param_groups"]):
        return state
    own = {id(each): (name, plain) for plain, (name, each) in _both_names(model).items()}
    groups = []
    for saved, group in zip(state["param_groups"], optimizer.param_groups, strict=True):
        names = saved.get("param_names")
        if names is not None and len(names) == len(group["params"]):  # somebody may have added to these
            pairs = [own.get(id(each), ("", "")) for each in group["params"]]
            names = [
                plain if given == name else given
                for given, (name, plain) in zip(names, pairs, strict=True)
            ]  # fmt: skip
            saved = {**saved, "param_names": names}
        groups.append(saved)
    return {**state, "param_groups": groups}


def with_own_names(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Return a state in which the optimizer's groups keep the names that it has for them now."""
    groups = [
        {**saved, "param_names": group["param_names"]} if "param_names" in group else saved
        for saved, group in zip(state["param_groups"], optimizer.param_groups, strict=False)
    ]
    return {**state, "param_groups": groups + state["param_groups"][len(groups) :]}


def _both_names(model: torch.nn.Module) -> dict[str, tuple[str, torch.nn.Parameter]]:
    found = dict(model.named_parameters())
    return {plain: (name, found[name]) for plain, name in plain_names(model, found).items()}


def _names(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str | None]]:
    by_id = {id(each): name for name, each in named_parameters(model).items()}
    return [[by_id.get(id(each)) for each in group["params"]] for group in optimizer.param_groups]


def _parameters(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, names: list[list[str | None]]
) -> list[list[torch.Tensor]] | None:
    """Return the parameters of each group; None if one is not to be found.

    What had no name in the model, such as a weight of the loss, is what stands in its place now.
    """
    named, now = named_parameters(model), [group["params"] for group in optimizer.param_groups]
    ids = {id(each) for each in named.values()}
    wanted: list[list[torch.Tensor]] = []
    for number, group in enumerate(names):
        unnamed = iter([each for each in now[number] if id(each) not in ids] if number < len(now) else [])
        found = [next(unnamed, None) if name is None else named.get(name) for name in group]
        if any(each is None for each in found):
            return None
        wanted.append([each for each in found if each is not None])
    return wanted


def _regroup(
    optimizer: torch.optim.Optimizer, wanted: list[list[torch.Tensor]], saved: list[dict[str, Any]]
) -> None:
    groups = optimizer.param_groups
    del groups[len(wanted) :]
    for group, parameters, before in zip(groups, wanted, saved, strict=False):
        group["params"] = parameters
        if "param_names" in group:
            group["param_names"] = before.get("param_names", group["param_names"])
    for parameters, before in zip(wanted[len(groups) :], saved[len(groups) :], strict=True):
        settings = {name: each for name, each in before.items() if name not in ("params", "param_names")}
        names = before.get("param_names")
        params: Any = parameters if names is None else list(zip(names, parameters, strict=True))
        optimizer.add_param_group({**settings, "params": params})


def keep_dtypes(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Give an optimizer's state the dtypes that it had: torch loads it in those of the parameters."""
    if type(optimizer).load_state_dict is not torch.optim.Optimizer.load_state_dict:
        return  # it has a reason of its own
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    for number, parameter in zip(numbers, parameters, strict=True):
        now = optimizer.state.get(parameter, {})
        for name, saved in state["state"].get(number, {}).items():
            if isinstance(saved, torch.Tensor) and saved.dtype != now[name].dtype:
                now[name] = saved.to(now[name].device)
