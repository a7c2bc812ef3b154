"""Who a process is, from arguments and the environment; barriers between real processes."""

import os
import socket
import subprocess
import sys
import textwrap
import threading
import time
from types import SimpleNamespace

import jax
import pytest

from fusejax.errors import InputError, Stuck
from fusejax.parallel import barrier, is_first, process_count, process_index, processes, start_processes
from tests.paths import ROOT

NAMES = ("FUSEJAX_COORDINATOR", "FUSEJAX_PROCESSES", "FUSEJAX_PROCESS", "FUSEJAX_LOCAL_DEVICES", "FUSEJAX_DISTRIBUTED")


@pytest.fixture
def given(monkeypatch):
    """Sets the environment, starts, and returns what JAX was asked for."""
    for name in [*NAMES, *(name for name in os.environ if name.startswith("SLURM_")), "CUDA_VISIBLE_DEVICES"]:
        monkeypatch.delenv(name, raising=False)
    asked = {}
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **options: asked.update(options, args=args))

    def start(environment=(), **arguments):
        for name, value in dict(environment).items():
            monkeypatch.setenv(name, value)
        start_processes(**arguments)
        return asked

    return start


def test_one_process_needs_nothing(given):
    assert given() == {}
    assert (process_index(), process_count(), is_first()) == (0, 1, True)
    barrier("alone", seconds=0.001)  # returns


def test_a_slurm_shell_alone_starts_nothing(given):
    assert given({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"}) == {}


def test_the_environment_and_arguments_say_who_this_is(given):
    environment = {"FUSEJAX_COORDINATOR": "h:1", "FUSEJAX_PROCESSES": "3", "FUSEJAX_LOCAL_DEVICES": "4, 5"}
    asked = given(environment, index=2, timeout=7)
    assert asked["args"] == ("h:1", 3, 2)
    assert asked["local_device_ids"] == [4, 5]
    assert asked["initialization_timeout"] == 7
    assert asked["cluster_detection_method"] == "deactivate"


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"FUSEJAX_PROCESSES": "2"}, ["FUSEJAX_COORDINATOR and FUSEJAX_PROCESS must be set"]),
        ({"FUSEJAX_PROCESS": "1"}, ["FUSEJAX_COORDINATOR and FUSEJAX_PROCESSES"]),
        ({"FUSEJAX_COORDINATOR": "h:1"}, ["FUSEJAX_PROCESSES and FUSEJAX_PROCESS"]),
        ({"FUSEJAX_COORDINATOR": "h", "FUSEJAX_PROCESSES": "2", "FUSEJAX_PROCESS": "1"}, ["'h'", "host:port"]),
        ({"FUSEJAX_COORDINATOR": "h:1", "FUSEJAX_PROCESSES": "2", "FUSEJAX_PROCESS": "2"}, ["expected 0 to 1"]),
        ({"FUSEJAX_PROCESSES": "two"}, ["FUSEJAX_PROCESSES is 'two'"]),
        ({"FUSEJAX_LOCAL_DEVICES": "0,0"}, ["FUSEJAX_LOCAL_DEVICES is '0,0'"]),
        ({"FUSEJAX_DISTRIBUTED": "yes"}, ["FUSEJAX_DISTRIBUTED is 'yes'", "auto"]),
    ],
)
def test_half_an_answer_is_an_error(given, environment, words):
    with pytest.raises(InputError) as caught:
        given(environment)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    ("visible", "tasks", "local", "devices"),
    [
        ("0,1,2,3,4,5,6,7", "1(x2)", "0", [0, 1, 2, 3, 4, 5, 6, 7]),  # JAX alone would use GPU 0
        ("0,1,2,3,4,5,6,7", "8(x2)", "5", [5]),
        ("0,1,2,3,4,5,6,7", "2", "1", [4, 5, 6, 7]),
        ("3", "8", "3", [0]),  # bound by SLURM: the only one it sees
        (None, "8", "3", None),
    ],
)
def test_slurm_tasks_share_the_gpus_of_their_node(given, visible, tasks, local, devices):
    environment = {"SLURM_JOB_ID": "1", "SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_LOCALID": local}
    environment |= {"FUSEJAX_DISTRIBUTED": "auto"} | ({"CUDA_VISIBLE_DEVICES": visible} if visible else {})
    asked = given(environment)
    assert asked["local_device_ids"] == devices
    assert asked["args"] == (None, None, None)
    assert asked["cluster_detection_method"] is None


def test_slurm_tasks_that_cannot_share_are_refused(given):
    environment = {"SLURM_JOB_ID": "1", "SLURM_GPUS_ON_NODE": "8", "SLURM_STEP_TASKS_PER_NODE": "3"}
    with pytest.raises(InputError, match=r"3 SLURM tasks .* 8 GPUs .*--ntasks-per-node=8"):
        given(environment | {"FUSEJAX_DISTRIBUTED": "auto"})


@pytest.mark.parametrize(
    ("nodes", "readable"),
    [
        ("node[001-002],h3", True),
        ("a100-[3,5]", True),
        ("one.example.org", True),
        ("gpu[01-02]-ib", False),
        ("rack[1-2]n[1-4]", False),
    ],
)
def test_node_lists_that_jax_reads_wrongly_are_refused(given, nodes, readable):
    environment = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": nodes, "FUSEJAX_DISTRIBUTED": "auto"}
    if readable:
        assert given(environment)["args"] == (None, None, None)
        return
    with pytest.raises(InputError, match="FUSEJAX_COORDINATOR"):
        given(environment)
    assert given(environment, coordinator="gpu01-ib:1")["args"] == ("gpu01-ib:1", None, None)


class Service:
    """A coordination service in which another process gets on for some looks, and never comes."""

    def __init__(self, looks):
        self.looks, self.ended = looks, threading.Event()

    def key_value_set(self, key, value, allow_overwrite=False):
        pass

    def key_value_dir_get(self, directory):
        if "progress" not in directory:
            return [(f"{directory}0", "1")]  # who has come
        self.looks -= 1
        return [(f"{directory}1", str(max(self.looks, 0)))]

    def wait_at_barrier(self, place, milliseconds):
        self.ended.wait(60)


@pytest.mark.parametrize("looks", [1, 12])
def test_a_wait_lasts_while_others_get_on(monkeypatch, looks):
    service = Service(looks)
    state = SimpleNamespace(client=service, num_processes=2, process_id=0)
    monkeypatch.setattr(processes, "_state", lambda: state)
    began = time.monotonic()
    with pytest.raises(Stuck, match=r"'far \d+': process 1 did not come, and no other process has got on for 0\.2 s"):
        barrier(f"far {looks}", seconds=0.2)
    took = time.monotonic() - began
    service.ended.set()
    assert service.looks < 0 and took > (0.2 if looks == 1 else 0.6)


TOGETHER = """
    import jax, numpy as np
    from jax.sharding import NamedSharding, PartitionSpec
    from fusejax.parallel import batch_sharding, make_mesh, own_rows, to_host
    from fusejax.parallel import barrier, collect, is_first, process_count, process_index, start_processes

    assert start_processes(timeout=60) == process_count() == jax.process_count() == 2
    assert process_index() == jax.process_index()
    assert collect("who", {"rank": process_index()}, seconds=30) == [{"rank": 0}, {"rank": 1}]
    assert collect("who", process_index(), seconds=30) == [0, 1]

    def same(found, expected, dtype):
        if is_first():
            np.testing.assert_array_equal(found, expected)
            assert found.dtype == dtype
        else:
            assert found is None

    batch, stacked = np.arange(24).reshape(8, 3), np.arange(96).reshape(3, 4, 8)
    for sizes, rows in [((2, 2, 1), 4), ((1, 2, 2), 4), ((1, 1, 4), 8)]:  # the last: one row on all devices
        mesh = make_mesh(**dict(zip(("data", "fsdp", "tensor"), sizes)))
        rows_on = batch_sharding(mesh)
        own = own_rows(rows_on, 8)
        assert len(own) == rows
        placed = jax.make_array_from_process_local_data(rows_on, batch[own])
        assert placed.shape == batch.shape
        for shard in placed.addressable_shards:
            np.testing.assert_array_equal(shard.data, batch[shard.index])
        same(to_host(placed, dtype=np.float32), batch, np.float32)
        split = NamedSharding(mesh, PartitionSpec(None, "fsdp", "tensor"))
        same(to_host(jax.make_array_from_callback(stacked.shape, split, lambda i: stacked[i])), stacked, np.int32)
    same(to_host(batch), batch, np.int64)
    for _ in range(2):  # a barrier can be passed again
        barrier("both", seconds=30)
    if is_first():
        try:
            barrier("only one", seconds=0.5)
        except TimeoutError as error:
            print(error)
    barrier("end", seconds=30)
    print("process", process_index())
"""


def test_two_processes_share_rows_and_arrays_and_a_barrier_names_who_is_missing():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {"FUSEJAX_COORDINATOR": address, "FUSEJAX_PROCESSES": "2", "PYTHONPATH": str(ROOT)}
    environment |= {"XLA_FLAGS": "", "JAX_NUM_CPU_DEVICES": "2"}
    command = [sys.executable, "-c", textwrap.dedent(TOGETHER)]
    ranks = [
        subprocess.Popen(command, env=environment | {"FUSEJAX_PROCESS": str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        first, second = (rank.communicate(timeout=120)[0] for rank in ranks)
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert "barrier 'only one': process 1 did not come, and no other process has got on for 0.5 s" in first
    assert first.endswith("process 0\n")
    assert second.endswith("process 1\n")
