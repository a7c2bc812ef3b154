"""Flags are tried where they can do no harm, and only what is accepted is set."""

import os
import shlex
import subprocess
import sys

import pytest

from fusejax.cli import main
from fusejax.parallel.flags import Setting, load_settings
from fusejax.stages import flags
from tests.paths import ROOT

GOOD = "--xla_gpu_enable_latency_hiding_scheduler=true"
BAD = (
    "--xla_gpu_enable_async_collectives=true",
    "--xla_tpu_scoped_vmem_limit_kib=61440",
)  # an old one, a misplaced one
ILLEGAL = "--xla_gpu_all_gather_combine_threshold_bytes=many"


def test_the_compiler_names_what_it_refuses():
    """One process for the flags it does not know, one for the value, one for the rest."""
    refused = flags.refused_flags("XLA_FLAGS", [BAD[0], GOOD, ILLEGAL, BAD[1]])
    assert set(refused) == {*BAD, ILLEGAL}
    assert "unknown" in refused[BAD[0]] and "value" in refused[ILLEGAL]


def test_every_gpu_flag_of_ours_is_known_to_the_tested_versions():
    settings = load_settings("h100").settings
    assert [v.setting.value for v in flags.judge(settings) if not v.accepted] == []


def _compiler(bad: str, calls: list[int], *, broken: bool = False):
    """One that ends at a flag without a word about it; a broken one ends always."""

    def ask(variable, tried):
        calls.append(len(tried))
        return "Aborted (core dumped)" if broken or bad in tried else None

    return ask


def test_a_compiler_that_says_nothing_is_asked_by_halves():
    calls: list[int] = []
    tried = [f"--flag_{n}=1" for n in range(16)]
    refused = flags.refused_flags("XLA_FLAGS", tried, ask=_compiler(tried[5], calls))
    assert list(refused) == [tried[5]] and "Aborted" in refused[tried[5]]
    assert len(calls) <= 16


def test_a_broken_compiler_says_nothing_about_flags(monkeypatch):
    ask = _compiler("", [], broken=True)
    with pytest.raises(RuntimeError, match="cannot be asked"):
        flags.refused_flags("XLA_FLAGS", [GOOD], ask=ask)
    monkeypatch.setattr(flags, "_ask", ask)
    (verdict,) = flags.judge([Setting("XLA_FLAGS", GOOD, "", "")])
    assert verdict.accepted is None
    assert flags.export_lines([verdict]) == ""


def test_what_libtpu_writes_is_understood():
    wrote = (
        "E0000 common_lib.cc:906] something else\nERROR: Unknown command line flag 'xla_tpu_old'\n"
        "ERROR: Illegal value 'abc' specified for flag 'xla_tpu_scoped_vmem_limit_kib'\n"
    )
    tried = ["--xla_tpu_old=1", "--xla_tpu_scoped_vmem_limit_kib=abc", "--xla_tpu_new=1"]
    refused = flags.refused_flags("LIBTPU_INIT_ARGS", tried, ask=lambda _, now: wrote if tried[0] in now else None)
    assert list(refused) == tried[:2]


@pytest.mark.parametrize(
    ("device", "kind"),
    [
        ("NVIDIA A100-SXM4-40GB", "a100"),
        ("NVIDIA A100 80GB PCIe", "a100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h100"),
        ("NVIDIA RTX A1000", "nvidia"),  # not an A100
        ("NVIDIA L4", "nvidia"),
        ("TPU v5e", "v5e"),
        ("TPU v5p", "v5p"),
        ("TPU v6e", "v6e"),
        ("TPU v4", "tpu"),
        ("cpu", "cpu"),
    ],
)
def test_devices_have_settings(device, kind):
    assert flags.kind_of(device) == kind


def test_lines_can_be_evaluated_and_leave_what_the_user_has_set(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_all_gather_combine_threshold_bytes=5 --xla_dump_to=/tmp/a$b")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    settings = load_settings("a100").settings
    lines = flags.export_lines([flags.Verdict(setting, True) for setting in settings])
    script = lines + '\nprintf "%s\\n" "$XLA_FLAGS" "$NCCL_DEBUG" "$XLA_PYTHON_CLIENT_MEM_FRACTION"'
    done = subprocess.run(["bash", "-euc", script], capture_output=True, text=True, env=dict(os.environ), check=True)
    xla, nccl, fraction = done.stdout.splitlines()
    assert xla.startswith(GOOD) and xla.endswith(os.environ["XLA_FLAGS"])
    assert xla.count("all_gather_combine") == 1
    assert (nccl, fraction) == ("INFO", "0.92")


def test_rejected_flags_are_named_and_not_printed(tmp_path, capsys):
    own = tmp_path / "site.yaml"
    entries = "".join(
        f"  - {{variable: XLA_FLAGS, value: {flag}, reason: r, source: s}}\n" for flag in (GOOD, BAD[0], ILLEGAL)
    )
    own.write_text("settings:\n" + entries)
    assert main(["env", "--flags", str(own)]) == 0
    out, err = capsys.readouterr()
    assert GOOD in shlex.split(out)[1] and "async_collectives" not in out and "many" not in out
    assert BAD[0] in err and ILLEGAL in err


def test_a_bad_flag_in_the_environment_is_an_error_and_not_a_crash():
    done = subprocess.run(
        [sys.executable, "-m", "fusejax", "env"],
        env={**os.environ, "XLA_FLAGS": BAD[0], "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 2, done.stderr
    assert BAD[0] in done.stderr and "Remove it" in done.stderr
