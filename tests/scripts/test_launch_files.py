"""The launch files are of the form that their programs take, and agree with each other. No cluster is asked."""

import copy
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from fusejax.cli import COMMANDS
from tests.paths import ROOT
from tests.scripts.crd import problems, schema_of
from tests.scripts.jobset import JobSet

pytestmark = pytest.mark.once

SCRIPTS = ROOT / "scripts"
JOBSETS = sorted(SCRIPTS.glob("gke_jobset_*.yaml"))
LAUNCH = [
    *JOBSETS,
    *(SCRIPTS / name for name in ("slurm.sbatch", "ssh.sh", "tpu_vm.sh", "skypilot.yaml", "process.sh")),
]


def _read(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", JOBSETS, ids=lambda path: path.stem)
def test_jobsets_have_no_unknown_field_and_their_parts_agree(path):
    found = JobSet.model_validate(_read(path))
    (job,) = found.spec.replicatedJobs
    pod = job.template.spec.template.spec
    (container,) = pod.containers
    assert pod.terminationGracePeriodSeconds >= 180
    assert container.command[:2] == ["bash", "scripts/process.sh"]
    assert container.command[2] in COMMANDS and (ROOT / container.command[3]).is_file()
    longest = f"{found.metadata.name}-{job.name}-{job.replicas - 1}-{job.template.spec.completions - 1}"
    assert len(longest) <= 49, "host names are made of these"
    codes = {code for rule in job.template.spec.podFailurePolicy.rules for code in rule.onExitCodes.values}
    assert codes == {1, 2}, "85 and 75 restart, these do not"
    settings = {variable.name: variable.value for variable in container.env}
    if "FUSEJAX_COORDINATOR" in settings:
        host = f"{found.metadata.name}-{job.name}-0-0.{found.metadata.name}"
        assert settings["FUSEJAX_COORDINATOR"].rsplit(":", 1)[0] == host
        assert int(settings["FUSEJAX_PROCESSES"]) == job.template.spec.completions * job.replicas
    else:
        assert settings["FUSEJAX_DISTRIBUTED"] == "auto"


def _changes():
    """Mistakes that one makes in such a file: where, and what stands there then."""
    pod = ("spec", "replicatedJobs", 0, "template", "spec", "template", "spec")
    job = ("spec", "replicatedJobs", 0, "template", "spec")
    return [
        (("spec", "failurePolicy"), {"maxRestart": 3}),
        (("spec", "failurePolicy", "rules", 0), {"action": "FailJobSet"}),  # a rule needs a name
        ((*pod, "terminationGracePeriod"), 300),
        ((*pod, "restartPolicy"), "OnFailure"),
        ((*pod, "restartPolicy"), "Always"),
        ((*pod, "containers", 0, "env", 0), {"name": "FUSEJAX_PROCESSES", "value": 2}),  # a number is no text
        ((*pod, "containers", 0, "resource"), {}),
        ((*pod, "containers", 0, "volumeMounts", 0, "name"), "other"),
        ((*job, "parallelism"), 3),
        ((*job, "podFailurePolicy", "rules", 0, "onExitCodes", "containerName"), "other"),
        (("apiVersion",), "jobset.x-k8s.io/v1"),
    ]


def _with(place, value):
    """The file for GPUs with one of these mistakes."""
    found = at = copy.deepcopy(_read(SCRIPTS / "gke_jobset_gpu.yaml"))
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = value
    return found


@pytest.mark.parametrize(("place", "value"), _changes())
def test_mistakes_in_a_jobset_are_found(place, value):
    with pytest.raises(ValidationError):
        JobSet.model_validate(_with(place, value))


def test_the_real_definition_of_jobsets_takes_our_files_and_no_mistakes():
    place = os.environ.get("FUSEJAX_JOBSET_CRD")
    if not place:
        pytest.skip("FUSEJAX_JOBSET_CRD names no file: docs/launch.md says where JobSet's definition is")
    schema = schema_of(Path(place).read_text(encoding="utf-8"), "v1alpha2")
    for path in JOBSETS:
        assert not problems(_read(path), schema), path.name
    mistakes = [_with(*change) for change in _changes()]
    found = [bool(problems(mistake, schema)) for mistake in mistakes]
    assert found == [True, True, True, False, False, True, True, False, False, False, False], (
        "others are between fields"
    )


def test_a_definition_is_read_strictly():
    name = {"type": "string", "pattern": "^[a-z]+$", "maxLength": 3}
    rule = {
        "type": "object",
        "required": ["name"],
        "properties": {"name": name, "on": {"enum": ["A"], "type": "string"}},
    }
    limits = {"type": "object", "additionalProperties": {"x-kubernetes-int-or-string": True}}
    count = {"type": "integer", "minimum": 0}
    properties = {"rules": {"type": "array", "maxItems": 1, "items": rule}, "limits": limits, "count": count}
    schema = {"type": "object", "properties": properties | {"metadata": {"type": "object"}}}
    right = {
        "rules": [{"name": "abc", "on": "A"}],
        "limits": {"gpu": 8, "cpu": "1"},
        "count": 0,
        "metadata": {"name": "x"},
    }
    assert problems(right, schema) == []
    wrong = {"rules": [{"nam": "abc", "on": "B"}, {"name": "ABCD"}], "limits": {"gpu": 8.5}, "count": True, "other": 1}
    said = problems(wrong, schema)
    assert [line.split(":")[0] for line in said] == [
        *("$.rules", "$.rules[0].name", "$.rules[0].nam", "$.rules[0].on", "$.rules[1].name", "$.rules[1].name"),
        *("$.limits.gpu", "$.count", "$.other"),
    ]
    assert problems({"count": -1}, schema) == ["$.count: -1 is below or above what is allowed"]


def _sky(path, home):
    """SkyPilot's own parser; it does not look for the machines."""
    python = ROOT / ".venv-sky" / "bin" / "python"
    if not python.is_file():
        pytest.importorskip("sky", reason="no SkyPilot: FUSEJAX_SKYPILOT=1 bash scripts/test.sh makes .venv-sky for it")
        python = sys.executable
    code = "import sky, sys; task = sky.Task.from_yaml(sys.argv[1]); print(task.num_nodes, *task.file_mounts or {})"
    environment = {**os.environ, "HOME": str(home)}
    return subprocess.run(
        [python, "-c", code, path], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )


def test_skypilot_takes_its_file_and_no_other_mount(tmp_path):
    done = _sky(SCRIPTS / "skypilot.yaml", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == "1"
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text((SCRIPTS / "skypilot.yaml").read_text(encoding="utf-8").replace("MOUNT_CACHED", "MOUNT_ALWAYS"))
    assert _sky(wrong, tmp_path).returncode != 0


def test_skypilot_s_file_is_consistent():
    found = _read(SCRIPTS / "skypilot.yaml")
    assert {"name", "num_nodes", "resources", "envs", "workdir", "file_mounts", "setup", "run"} == set(found)
    assert set(found["resources"]["job_recovery"]["recover_on_exit_codes"]) == {75, 85}
    assert (ROOT / found["envs"]["CONFIG"]).is_file()
    for part in ("setup", "run"):
        assert subprocess.run(["bash", "-n", "-c", found[part]]).returncode == 0


@pytest.mark.parametrize("path", LAUNCH, ids=lambda path: path.name)
def test_no_secret_and_no_site_is_in_a_launch_file(path):
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"(?i)(token|password|secret|api_?key)\s*[:=]", text)
    assert not re.search(r"^#SBATCH --(account|partition|qos|mail)", text, flags=re.MULTILINE)


def _bash(script, **environment):
    """Runs a few lines after `launch_common.sh`."""
    return subprocess.run(
        ["bash", "-euc", f". scripts/launch_common.sh\n{script}"],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_what_is_started_again():
    done = _bash('for code in 0 1 2 75 85 130 134 137 143; do if deserves_restart $code; then echo "$code"; fi; done')
    assert done.stdout.split() == ["75", "85", "130", "134", "137", "143"]


def test_the_first_end_is_the_cause(tmp_path):
    ends = {"20.5.1": "143", "9.75.0": "0", "10.25.3": "1", "11.0.2": "134"}
    for name, code in ends.items():
        (tmp_path / name).write_text(code + "\n")
    assert _bash(f"first_end {tmp_path} 9").stdout.split() == ["1"]
    (tmp_path / "10.25.3").unlink()
    assert _bash(f"first_end {tmp_path} 9").stdout.split() == ["134"]
    assert _bash(f"mkdir {tmp_path}/none; first_end {tmp_path}/none 9").stdout.split() == ["9"]


def _fake(tmp_path, name, body):
    """A program of this name for the PATH."""
    path = tmp_path / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)
    return path


def _run(tmp_path, words, **environment):
    return subprocess.run(
        ["bash", *words],
        cwd=ROOT,
        env={
            **os.environ,
            "FUSEJAX_VENV": str(tmp_path),
            "FUSEJAX_FLAGS": "none",
            "HOME": str(tmp_path),
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_process_evaluates_the_settings_of_its_device(tmp_path):
    lines = "export XLA_FLAGS='--a=1 --b=2'"
    body = f'if [ "$*" = "env --flags a100" ]; then echo "{lines}"; else echo "$XLA_FLAGS|$*"; fi'
    _fake(tmp_path, "fusejax", body)
    done = _run(tmp_path, ["scripts/process.sh", "train", "a b.yaml"], FUSEJAX_FLAGS="a100")
    assert done.stdout == "--a=1 --b=2|train a b.yaml\n", done.stderr
    _fake(tmp_path, "fusejax", "exit 2")
    assert _run(tmp_path, ["scripts/process.sh", "train"], FUSEJAX_FLAGS="bad").returncode == 2


SSH = 'cd "$HOME"; exec bash -c "$2"'  # the "host" is this machine


def test_ssh_starts_one_process_per_host_and_again_after_a_preemption(tmp_path):
    ssh = _fake(tmp_path, "reach", SSH)
    body = (
        'echo "$FUSEJAX_COORDINATOR $FUSEJAX_PROCESS of $FUSEJAX_PROCESSES: $*"\n'
        '[ -f "$HOME/again$FUSEJAX_PROCESS" ] || { touch "$HOME/again$FUSEJAX_PROCESS"; exit 85; }'
    )
    _fake(tmp_path, "fusejax", body)
    words = ["scripts/ssh.sh", "me@one two", "train", "a b.yaml"]
    done = _run(tmp_path, words, FUSEJAX_SSH=f"bash {ssh}")
    lines = sorted(done.stdout.split("\n"))
    assert done.returncode == 0, done.stderr
    assert lines.count("0: one:12345 0 of 2: train a b.yaml") == 2
    assert lines.count("1: one:12345 1 of 2: train a b.yaml") == 2
    assert "start 1 on 2 hosts ended with 0" in done.stderr


@pytest.mark.parametrize("code", [1, 2])
def test_ssh_does_not_repeat_a_mistake(tmp_path, code):
    ssh = _fake(tmp_path, "reach", SSH)
    _fake(tmp_path, "fusejax", f"exit {code}")
    hosts = tmp_path / "hosts"
    hosts.write_text("# our machines\none\n\n")
    done = _run(tmp_path, ["scripts/ssh.sh", str(hosts), "train", "x"], FUSEJAX_SSH=f"bash {ssh}")
    assert done.returncode == code
    assert done.stderr.count("== start") == 1


def test_ssh_hands_a_signal_on_and_does_not_start_again(tmp_path):
    ssh = _fake(tmp_path, "reach", SSH)
    body = 'trap "exit 85" TERM; touch "$HOME/up$FUSEJAX_PROCESS"; while true; do sleep 0.1; done'
    _fake(tmp_path, "fusejax", body)
    own = {"FUSEJAX_VENV": str(tmp_path), "FUSEJAX_FLAGS": "none", "HOME": str(tmp_path), "FUSEJAX_SSH": f"bash {ssh}"}
    script = subprocess.Popen(
        ["bash", "scripts/ssh.sh", "one two", "train", "x"],
        cwd=ROOT,
        env={**os.environ, **own},
        stderr=subprocess.PIPE,
        text=True,
    )
    end = time.monotonic() + 30
    while not ((tmp_path / "up0").exists() and (tmp_path / "up1").exists()):
        assert time.monotonic() < end
        time.sleep(0.05)
    script.terminate()
    said = script.communicate(timeout=30)[1]
    assert script.returncode == 85, said
    assert said.count("== start") == 1


def test_tpu_vm_says_which_command_runs_where(tmp_path):
    log = tmp_path / "log"
    _fake(tmp_path, "gcloud", f'printf "%s\\n" "$@" >>"{log}"\n[ "$(grep -c "^ssh$" "{log}")" -ge 2 ] || exit 75')
    path = f"{tmp_path}/bin:{os.environ['PATH']}"
    done = _run(tmp_path, ["scripts/tpu_vm.sh", "slice", "zone-a", "train", "a b.yaml"], PATH=path)
    assert done.returncode == 0, done.stderr
    said = log.read_text()
    assert said.count("--worker=all") == 2 and "--zone=zone-a" in said
    assert "FUSEJAX_DISTRIBUTED=auto" in said and "train a\\ b.yaml" in said


def test_one_machine_slurm_says_how_it_is_called():
    assert shutil.which("bash")
    done = subprocess.run(["bash", "scripts/dev/one_machine_slurm.sh"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and "start|stop DIR" in done.stderr
