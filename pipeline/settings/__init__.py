"""Every setting of a Trainer: its default, what it may be, and how to say what is wrong."""

from pipeline.settings.settings import (
    AUTO_RUN_DIR,
    AUTOCAST_DTYPE,
    GilMode,
    Placement,
    PlaceName,
    Precision,
    Settings,
    setting_names,
    type_problems,
)

__all__ = [
    "AUTOCAST_DTYPE",
    "AUTO_RUN_DIR",
    "GilMode",
    "PlaceName",
    "Placement",
    "Precision",
    "Settings",
    "setting_names",
    "type_problems",
]
