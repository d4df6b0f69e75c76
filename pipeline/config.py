"""From a composed Hydra config to a run: check all of it, build the parts, train."""

from __future__ import annotations

import difflib
import math
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.core.config_store import ConfigStore
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from pipeline.errors import ConfigError, counted
from pipeline.gil import to_text
from pipeline.protocols import Datasets
from pipeline.result import FitResult
from pipeline.settings import setting_names, type_problems
from pipeline.trainer import Trainer

_KEYS: dict[str, type | tuple[type, ...]] = {
    "seed": int,
    "batch_size": int,
    "shuffle": bool,
    "drop_last": bool,
    "num_shards": int,
    "scheduler_interval": str,
    "data": dict,
    "model": dict,
    "optim": dict,
    "scheduler": (dict, type(None)),
    "trainer": dict,
    "loss": dict,
    "metrics": dict,
    "callbacks": list,
    "loggers": dict,
    "objective": str,
    "vars": dict,
}
# Without this Hydra would refuse the first mistyped key and stay silent on the others.
ConfigStore.instance().store(group="trainer", name="any_key", node=DictConfig({}, flags={"struct": False}))
EXIT_CODES = {"SIGINT": 130, "SIGTERM": 143, "max_time": 75}  # 75: "try again", of sysexits.h
"""The exit code of a run that was stopped and can be resumed, by its stop reason; of any other it is 0."""

_SET_ELSEWHERE = {"run_dir": "hydra.run.dir=…"} | {
    name: f"{name}=…"
    for name in ("seed", "batch_size", "shuffle", "drop_last", "num_shards", "scheduler_interval")
}


def config_dir() -> Path:
    """Return the folder of the configs: beside the package in a checkout, inside it in a wheel."""
    package = Path(__file__).resolve().parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def train_from_config(config: DictConfig, run_dir: Path) -> tuple[FitResult, float]:
    """Check a config, build what it describes, train, and say how it went.

    Args:
        config: As composed by Hydra.
        run_dir: Where the run's files go.

    Returns:
        The result, and the objective for a sweeper.

    Raises:
        ConfigError: Naming everything that is wrong with the config.
    """
    values = check_config(config)
    trainer = _make_trainer(values, run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.yaml").write_text(OmegaConf.to_yaml(config, resolve=True), encoding="utf-8")
    _seed_everything(values["seed"])
    data: Datasets = _build(config, "data")
    _check_data(data, values)
    model = _build(config, "model")(input_shape=data.input_shape, num_classes=data.num_classes)
    optimizer = _build(config, "optim")(model.parameters())
    scheduler = _build(config, "scheduler")(optimizer) if values.get("scheduler") else None
    result = trainer.fit(
        model,
        optimizer,
        data.train,
        loss_fn=_build(config, "loss"),
        batch_size=values["batch_size"],
        shuffle=values["shuffle"],
        drop_last=values["drop_last"],
        num_shards=values["num_shards"],
        val_data=data.val,
        scheduler=scheduler,
        scheduler_interval=values["scheduler_interval"],
        metrics=_build(config, "metrics"),
        callbacks=_build(config, "callbacks"),
        loggers=list(_build(config, "loggers").values()),
        hparams={name: value for name, value in values.items() if name != "trainer"},
    )
    print(_summary(result, is_images=len(data.input_shape) == 3))
    if result.gil is not None:
        print(to_text(result.gil), file=sys.stderr)
    return result, result.metrics.get(values["objective"], math.nan)  # a run that was stopped may have none


def check_overrides(arguments: Sequence[str]) -> None:
    """Refuse overrides of keys that no config has, all at once and before Hydra stops at the first.

    Args:
        arguments: The command line, without the program.

    Raises:
        ConfigError: Naming each of them, and the key that was probably meant.
    """
    typed = [argument.split("=")[0] for argument in arguments if "=" in argument and argument[0] not in "-+~"]
    problems = []
    for key in typed:
        if key.split(".")[0].split("@")[0] in {*_KEYS, "hydra"} or "/" in key:
            continue
        meant = f"trainer.{key}" if key in setting_names() else f"+{key}" if key == "recipe" else None
        close = difflib.get_close_matches(key, _KEYS, n=1)
        hint = f"Did you mean {meant or close[0]}?" if meant or close else _KNOWN
        problems.append(f"{key} is not a key of the config. {hint}")
    is_named = any(argument.startswith("hydra.run.dir=") for argument in arguments)
    if not is_named and any(argument.endswith("trainer.resume=auto") for argument in arguments):
        problems.append(
            "trainer.resume=auto looks into the run's folder, which is a new one each time. Name it as well: "
            "hydra.run.dir=runs/NAME."
        )
    if problems:
        raise ConfigError(problems)


def check_config(config: DictConfig) -> dict[str, Any]:
    """Return the config as plain containers.

    Raises:
        ConfigError: Naming every unknown key, wrong type and missing value at once.
    """
    missing = sorted(OmegaConf.missing_keys(config))
    problems = [f"{key} is missing. Type {key}=…" for key in missing]
    found = OmegaConf.to_container(config, resolve=not missing)
    assert isinstance(found, dict)
    values: dict[str, Any] = {str(key): value for key, value in found.items()}
    if not values.get("data") and not values.get("model"):
        recipes = sorted(path.stem for path in (config_dir() / "recipe").glob("*.yaml"))
        raise ConfigError(f"no recipe was chosen. Type +recipe=NAME; there are: {', '.join(recipes)}.")
    for key, wanted in _KEYS.items():
        if key != "vars" and not isinstance(values.get(key), wanted):
            problems.append(f"{key} must be {_name(wanted)}, got {values.get(key)!r}.")
    problems += [f"{key} is not a key of the config. {_KNOWN}" for key in values if key not in _KEYS]
    for key in ("data", "model", "optim", "scheduler", "loss"):
        section = values.get(key)
        if isinstance(section, dict) and "_target_" not in section:
            problems.append(f"{key}._target_ is missing: name what to call, as in my_package.build.")
    if "T_max" in (values.get("scheduler") or {}) and values["scheduler"]["T_max"] is None:
        problems.append(
            "scheduler.T_max is null, since trainer.max_epochs is. Say when the learning rate reaches 0: "
            "scheduler.T_max=1000 scheduler_interval=step. Or leave the scheduler out: ~scheduler."
        )
    if values.get("scheduler_interval") not in ("step", "epoch"):
        problems.append(
            f"scheduler_interval must be step or epoch, got {values.get('scheduler_interval')!r}."
        )
    trainer = values.get("trainer") or {}
    problems += [
        f"trainer.{key} is set elsewhere. Type {elsewhere}."
        for key, elsewhere in _SET_ELSEWHERE.items()
        if key in trainer
    ]
    others = {name: value for name, value in trainer.items() if name not in _SET_ELSEWHERE}
    problems += type_problems(others, prefix="trainer.")
    if problems:
        raise ConfigError(problems)
    return values


def _build(config: DictConfig, key: str) -> Any:
    """Instantiate a section; what the user's own code raises comes out as it was."""
    try:
        return instantiate(config[key], _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__
        if cause is not None and not isinstance(cause, ImportError):
            raise cause from None
        raise ConfigError(f"{key} cannot be built: {cause or error}") from error


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    torch.manual_seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)


def _make_trainer(values: dict[str, Any], run_dir: Path) -> Trainer:
    try:
        return Trainer(**values["trainer"], seed=values["seed"], run_dir=run_dir)
    except ConfigError as error:
        raise ConfigError(
            [each if each.startswith("seed ") else f"trainer.{each}" for each in error.problems]
        ) from None


def _check_data(data: Any, values: dict[str, Any]) -> None:
    for name in ("train", "val", "input_shape", "num_classes"):
        if not hasattr(data, name):
            raise ConfigError(
                f"data._target_ must return pipeline.Datasets, got {type(data).__name__} without .{name}."
            )
    known = ["train/loss", "train/epoch_loss"]
    if data.val is not None:
        known += ["val/loss", *(f"val/{name}" for name in values["metrics"])]
    if values["objective"] not in known:
        raise ConfigError(f"objective must be one of {', '.join(known)}, got {values['objective']!r}.")


def _summary(result: FitResult, *, is_images: bool) -> str:
    words = [
        f"{name.removeprefix('val/')} {value:.2%}" if name == "val/accuracy" else f"{name} {value:.4g}"
        for name, value in sorted(result.metrics.items())
        if name.startswith("val/")
    ]
    unit = "images/s" if is_images else "samples/s"
    words.append(f"{result.samples_per_s:,.0f} {unit} ({result.schedule})")
    words.append(f"{counted(result.num_epochs, 'epoch')} in {result.train_s:.1f} s of training")
    return " · ".join([*words, f"{result.stop_reason} · {result.run_dir}"])


def _name(wanted: type | tuple[type, ...]) -> str:
    names: Mapping[type, str] = {
        int: "an integer",
        bool: "true or false",
        str: "a text",
        dict: "a section",
        list: "a list",
        type(None): "null",
    }
    types = wanted if isinstance(wanted, tuple) else (wanted,)
    return " or ".join(names[each] for each in types)


_KNOWN = f"There are: {', '.join(_KEYS)}. Put values of your own under vars."
