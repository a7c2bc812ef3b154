"""What a process makes of the variables of SLURM and scripts/slurm.sbatch: two nodes, a task per GPU, no SLURM."""

import jax
import pytest
from jax._src import clusters

from fusejax.errors import InputError
from fusejax.parallel import processes

pytestmark = pytest.mark.once


@pytest.fixture
def joined(monkeypatch):
    """Returns what a process with this environment would join with, after JAX has filled in what is left to it."""

    def run(environment):
        for name in ("CUDA_VISIBLE_DEVICES", "KUBERNETES_SERVICE_HOST", "OMPI_MCA_orte_hnp_uri"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        found = {}

        def initialize(coordinator, count, index, *, local_device_ids, cluster_detection_method, **_):
            found["all"] = clusters.ClusterEnv.auto_detect_unset_distributed_params(
                coordinator, count, index, local_device_ids, cluster_detection_method, 1
            )

        monkeypatch.setattr(jax.distributed, "initialize", initialize)
        processes.start_processes()
        return found["all"]

    return run


def _task(rank, **changes):
    """The variables of a task under srun, as SLURM 22.05 sets them."""
    return {
        "SLURM_JOB_ID": "77",
        "SLURM_STEP_NODELIST": "gpu[01-02]",
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
        "SLURM_NTASKS": "16",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank % 8),
        "SLURM_GPUS_ON_NODE": "8",
        "FUSEJAX_DISTRIBUTED": "auto",
    } | changes


@pytest.mark.parametrize("rank", [0, 7, 8, 15])
def test_the_launch_file_s_coordinator_is_kept_and_jax_finds_the_rest(joined, rank):
    # Such names JAX reads wrongly; the launch file gives the first, which scontrol has said.
    given = _task(rank, SLURM_STEP_NODELIST="gpu[01-02]-ib", FUSEJAX_COORDINATOR="gpu01-ib:61517")
    assert joined(given) == ("gpu01-ib:61517", 16, rank, [rank % 8])


@pytest.mark.parametrize("rank", [0, 9])
def test_srun_alone_is_enough_where_jax_reads_the_list_rightly(joined, rank):
    assert joined(_task(rank)) == ("gpu01:61517", 16, rank, [rank % 8])


def test_one_task_per_node_takes_all_its_gpus(joined):
    given = _task(1, SLURM_NTASKS="2", SLURM_STEP_TASKS_PER_NODE="1(x2)", SLURM_LOCALID="0")
    assert joined(given) == ("gpu01:61517", 2, 1, list(range(8)))


def test_without_gpus_nothing_is_restricted(joined):
    given = _task(3)
    del given["SLURM_GPUS_ON_NODE"]
    assert joined(given)[:3] == ("gpu01:61517", 16, 3)


def test_a_list_that_jax_reads_wrongly_is_refused_without_a_coordinator(joined):
    with pytest.raises(InputError, match="scontrol show hostnames"):
        joined(_task(0, SLURM_STEP_NODELIST="rack[1-2]n[1-4]"))
