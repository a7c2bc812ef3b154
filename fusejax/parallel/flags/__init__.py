"""Settings per kind of device: flags of the compiler and environment variables, each with a reason and a source.

They stand in data files beside this one, so that they can be read, compared and replaced without reading code. A file
may include another, whose settings it then changes or adds to. Nothing is set here: what the installed compiler
accepts is found out by `fusejax.stages.flags`, as a flag that it does not know ends the process.

Deliberately few: a setting is here because those who build or measure the compiler recommend it for this kind of
work. Most could not be timed where fusejax is developed; `docs/launch.md` says which were.
"""

from pathlib import Path
from typing import Any, NamedTuple

import yaml

from fusejax.errors import InputError, nearest

__all__ = ["FLAG_VARIABLES", "DeviceSettings", "Setting", "load_settings", "setting_kinds"]

FLAG_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")  # these hold many flags each
_DIRECTORY = Path(__file__).parent
_KEYS, _SETTING_KEYS = {"include", "devices", "settings"}, {"variable", "value", "reason", "source"}


class Setting(NamedTuple):
    """One flag of `XLA_FLAGS` or `LIBTPU_INIT_ARGS`, or the value of another environment variable."""

    variable: str
    value: str  # "--name=value", or the variable's value
    reason: str
    source: str

    @property
    def name(self) -> str:
        """What can be set once: the flag without its value, or the variable."""
        return self.value.split("=", 1)[0] if self.variable in FLAG_VARIABLES else self.variable


class DeviceSettings(NamedTuple):
    """The settings of one kind of device."""

    kind: str
    devices: tuple[str, ...]  # parts of the device's name, any case: "A100" is in "NVIDIA A100-SXM4-40GB"
    settings: tuple[Setting, ...]


def setting_kinds() -> tuple[str, ...]:
    """Returns the kinds there are files for, special ones before the general ones that they include."""
    names = sorted(path.stem for path in _DIRECTORY.glob("*.yaml"))
    included = {_read(_DIRECTORY / f"{name}.yaml").get("include") for name in names}
    return tuple(sorted(names, key=lambda name: (name in included, name)))


def load_settings(kind: str) -> DeviceSettings:
    """Returns the settings of a kind such as "a100", or those in a YAML file of the same form.

    Raises:
        InputError: there is no such kind, or the file is not of the form of those in this directory.
    """
    path = Path(kind) if kind.endswith((".yaml", ".yml")) else _DIRECTORY / f"{kind}.yaml"
    if not path.is_file():
        kinds = setting_kinds()
        raise InputError(
            f"no settings for {kind!r}.{nearest(kind, kinds)} There are: {', '.join(kinds)}, or a .yaml file"
        )
    read = _read(path)
    inherited = load_settings(read["include"]).settings if read.get("include") else ()
    merged = {setting.name: setting for setting in inherited}
    for number, entry in enumerate(read.get("settings") or [], start=1):
        setting = _setting(entry, f"{path}: setting {number}")
        merged[setting.name] = setting
    return DeviceSettings(path.stem, tuple(read.get("devices") or ()), tuple(merged.values()))


def _read(path: Path) -> dict[str, Any]:
    try:
        read = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not YAML: {error}") from error
    if not isinstance(read, dict) or set(read) - _KEYS:
        raise InputError(
            f"{path}: expected the keys {', '.join(sorted(_KEYS))}, got {read if not read else list(read)}"
        )
    return read


def _setting(entry: Any, place: str) -> Setting:
    if (
        not isinstance(entry, dict)
        or set(entry) != _SETTING_KEYS
        or not all(isinstance(v, str) for v in entry.values())
    ):
        raise InputError(f"{place}: expected texts for {', '.join(sorted(_SETTING_KEYS))}, got {entry}")
    setting = Setting(**entry)
    if setting.variable in FLAG_VARIABLES and (not setting.value.startswith("--") or " " in setting.value):
        raise InputError(f"{place}: {setting.value!r} is not one flag of the form --name=value")
    if not setting.variable.isidentifier():
        raise InputError(f"{place}: {setting.variable!r} cannot be the name of a variable")
    return setting
