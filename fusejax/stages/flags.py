"""Which settings this machine should run with, and which of them its compilers know.

A compiler ends the process at a flag that it does not know, and flags come and go with every release. So each is tried
first in a process of its own that uses no accelerator: JAX on the CPU reads `XLA_FLAGS`, and libtpu reads
`LIBTPU_INIT_ARGS` when it describes a TPU that need not be there. Both name all the flags they refuse, so a table takes
two or three processes of half a second; where they say nothing useful, halving finds the flag.

The kind of device is asked of the driver's files or of the PCI bus, not of JAX: that would take the accelerator, and
the flags would be too late.

Not here: whether a flag pays. And what a CUDA plugin of another version than jaxlib's would say.
"""

import importlib.metadata
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from fusejax.errors import InputError
from fusejax.parallel.flags import FLAG_VARIABLES, DeviceSettings, Setting, load_settings, setting_kinds

__all__ = [
    "Verdict",
    "check_own_flags",
    "detect_device",
    "export_lines",
    "judge",
    "kind_of",
    "own_flags",
    "refuse",
    "refused_flags",
    "resolve_kind",
]

# PCI device numbers of Google's TPUs (vendor 0x1ae0).
_TPU_VENDOR = "0x1ae0"
_TPU_DEVICES = {
    **{"0x0027": "TPU v2 or v3", "0x005e": "TPU v4", "0x0062": "TPU v5p", "0x0063": "TPU v5e", "0x006f": "TPU v6e"},
    "0x0076": "TPU v7x",
}
# What makes the compiler behind a variable read it.
_READERS = {
    "XLA_FLAGS": "import jax; jax.devices()",
    "LIBTPU_INIT_ARGS": "from jax.experimental import topologies as t; t.get_topology_desc('v5e:2x2', platform='tpu')",
}
_REFUSALS = (
    (re.compile(r"Unknown flags? in XLA_FLAGS: (.*)"), "unknown to this jaxlib"),
    (re.compile(r"interpret value \S* for flag (\w+)"), "not a value of this flag"),
    (re.compile(r"Illegal value for --(\w+)"), "not a value of this flag"),
    (re.compile(r"Unknown command line flag '(\w+)'"), "unknown to this libtpu"),
    (re.compile(r"Illegal value '.*' specified for flag '(\w+)'"), "not a value of this flag"),
)
_SECONDS = 120  # for one process; one that needs longer is not going to answer


class Verdict(NamedTuple):
    """What the compiler says about one setting."""

    setting: Setting
    accepted: bool | None  # None: nobody here could be asked
    note: str = ""


def detect_device() -> str:
    """Returns the name of the accelerator in this machine such as "NVIDIA A100-SXM4-40GB", or "cpu"; starts nothing."""
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return "cpu"
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        model = re.search(r"^Model:\s*(.+)$", _text(path), flags=re.MULTILINE)
        if model:
            return model[1].strip()
    if shutil.which("nvidia-smi"):
        asked = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, check=False
        )
        if asked.returncode == 0 and asked.stdout.strip():
            return asked.stdout.splitlines()[0].strip()
    for vendor in sorted(Path("/sys/bus/pci/devices").glob("*/vendor")):
        if _text(vendor).strip() == _TPU_VENDOR:
            name = _TPU_DEVICES.get(_text(vendor.with_name("device")).strip())
            if name:
                return name
    return "cpu"


def kind_of(device: str) -> str:
    """Returns the kind of settings for a device's name: the most special file that names it, else "cpu"."""
    for kind in setting_kinds():
        if any(re.search(rf"\b{re.escape(name)}\b", device, re.IGNORECASE) for name in load_settings(kind).devices):
            return kind
    return "cpu"


def resolve_kind(kind: str) -> DeviceSettings:
    """Returns the settings of a kind, of a file, or with "auto" of the device that is here."""
    return load_settings(kind_of(detect_device()) if kind == "auto" else kind)


def judge(settings: Sequence[Setting]) -> list[Verdict]:
    """Asks the compilers about settings; variables that are no lists of flags are accepted as they are."""
    refused: dict[tuple[str, str], str] = {}
    unasked: dict[str, str] = {}  # by variable
    for variable in FLAG_VARIABLES:
        flags = [setting.value for setting in settings if setting.variable == variable]
        if variable == "LIBTPU_INIT_ARGS" and _version("libtpu") is None:
            unasked[variable] = "libtpu is not installed"
            continue
        try:
            refused |= {(variable, flag): why for flag, why in refused_flags(variable, flags).items()}
        except RuntimeError as error:
            unasked[variable] = str(error)
    verdicts = []
    for setting in settings:
        why = refused.get((setting.variable, setting.value), "")
        accepted = None if setting.variable in unasked else not why
        verdicts.append(Verdict(setting, accepted, unasked.get(setting.variable, why)))
    return verdicts


def own_flags() -> list[Setting]:
    """Returns the flags that the environment holds."""
    return [Setting(name, word, "", "") for name in FLAG_VARIABLES for word in os.environ.get(name, "").split()]


def refuse(verdicts: Sequence[Verdict]) -> None:
    """Refuses flags of the environment that are not accepted.

    Raises:
        InputError: names each, its variable and what is wrong.
    """
    refused = [verdict for verdict in verdicts if verdict.accepted is False]
    if refused:
        problems = "; ".join(f"{v.setting.value} in {v.setting.variable}: {v.note}" for v in refused)
        raise InputError(f"JAX would end the process at {problems}. Remove it from the environment")


def check_own_flags() -> None:
    """Refuses flags in the environment at which every process would end; asks once, and only where there are any.

    Raises:
        InputError: names each, its variable and what is wrong.
    """
    refuse(_judged(tuple(own_flags())))


@lru_cache(maxsize=1)
def _judged(settings: tuple[Setting, ...]) -> list[Verdict]:
    return judge(settings)


def refused_flags(
    variable: str,
    flags: Sequence[str],
    *,
    ask: Callable[[str, Sequence[str]], str | None] | None = None,
) -> dict[str, str]:
    """Returns the flags that a compiler does not take, each with what is wrong with it.

    Args:
        variable: "XLA_FLAGS" or "LIBTPU_INIT_ARGS".
        flags: "--name=value" each.
        ask: stands in for the process that tries flags; returns None, or what it wrote before it ended.

    Raises:
        RuntimeError: the process ends without any flag too, so nothing can be said about flags.
    """
    ask = ask or _ask
    wrote = ask(variable, flags) if flags else None
    if wrote is None:
        return {}
    named = {}
    for pattern, why in _REFUSALS:
        for match in pattern.findall(wrote):
            named |= {word.lstrip("-").split("=", 1)[0]: why for word in match.split()}
    found = {flag: named[name] for flag in flags if (name := flag.lstrip("-").split("=", 1)[0]) in named}
    if found:
        return found | refused_flags(variable, [flag for flag in flags if flag not in found], ask=ask)
    if (without := ask(variable, ())) is not None:
        raise RuntimeError(f"it cannot be asked: {_last_line(without)}")
    if len(flags) == 1:
        return {flags[0]: f"ends the process: {_last_line(wrote)}"}
    half = len(flags) // 2
    return refused_flags(variable, flags[:half], ask=ask) | refused_flags(variable, flags[half:], ask=ask)


def export_lines(verdicts: Sequence[Verdict]) -> str:
    """Returns shell commands that set what was accepted, for `eval`.

    What the user has set stays: own flags come last and replace ours of the same name, own variables are left alone.
    """
    lines = []
    usable = [verdict.setting for verdict in verdicts if verdict.accepted]
    for variable in FLAG_VARIABLES:
        own = os.environ.get(variable, "").split()
        names = {word.split("=", 1)[0] for word in own}
        ours = [s.value for s in usable if s.variable == variable and s.name not in names]
        if ours:
            lines.append(f"export {variable}={shlex.quote(' '.join([*ours, *own]))}")
    for setting in usable:
        if setting.variable not in FLAG_VARIABLES and setting.variable not in os.environ:
            lines.append(f"export {setting.variable}={shlex.quote(setting.value)}")
    return "\n".join(lines)


def _ask(variable: str, flags: Sequence[str]) -> str | None:
    """Lets a compiler read flags in a process of its own; None where it went on, else what it wrote."""
    # A machine's own TPU is neither asked for at the metadata server nor taken.
    harmless = {
        **{"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"},
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    clean = {k: v for k, v in os.environ.items() if k not in FLAG_VARIABLES and not k.startswith("JAX_")}
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", _READERS[variable]],
            env={**clean, **harmless, variable: " ".join(flags)},
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {_SECONDS} s"
    return None if done.returncode == 0 else (done.stderr or f"exit code {done.returncode}")


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["it wrote nothing"])[-1][:200]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
