"""A cluster's file: strict, and every mistake is one line that says what is allowed."""

from pathlib import Path

import pytest

from benchmarks.errors import UserError
from benchmarks.executors.slurm.cluster import load_cluster, minutes

CLUSTERS = Path(__file__).parent.parent / "slurm" / "clusters"


def load(folder: Path, text: str):
    path = folder / "cluster.toml"
    path.write_text('title = "Mine"\n' + text)
    return load_cluster(path)


@pytest.mark.parametrize("path", sorted(CLUSTERS.glob("*.toml")), ids=lambda path: path.stem)
def test_the_examples_are_valid_and_say_what_they_are_for(path):
    cluster = load_cluster(path)
    assert cluster.title
    assert cluster.description


def test_stages_change_what_they_name_and_nothing_else(tmp_path):
    cluster = load(
        tmp_path,
        '[resources]\npartition = "gpu"\ntime_limit = "60"\n[stages.pof]\ntime_limit = "20"\n',
    )
    assert cluster.resources_of("sam").minutes == 60
    assert cluster.resources_of("pof").minutes == 20
    assert cluster.resources_of("pof").partition == "gpu"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("30", 30),
        ("29:01", 30),
        ("1:30:00", 90),
        ("2-00", 2880),
        ("1-02:03", 1563),
        ("1-02:03:01", 1564),
    ],
)
def test_time_limits_are_read_as_slurm_reads_them(text, expected):
    assert minutes(text) == expected


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[resource]\n", "resource: unknown key (did you mean 'resources'?); allowed here: title"),
        (
            '[resources]\npartitoin = "gpu"\n',
            "resources.partitoin: unknown key (did you mean 'partition'?); allowed here: partition",
        ),
        ('[stages.pof]\nmem = "1G"\n', "stages.pof.mem: unknown key"),
        ('[stages.pfo]\nmemory = "1G"\n', "stages.pfo: unknown key (did you mean 'pof'?)"),
        ('[stages.pof]\nmemory = "much"\n', "stages.pof.memory: "),
        ('[resources]\ntime_limit = "soon"\n', "resources.time_limit: must be a time like"),
        (
            '[resources]\ntime_limit = "0:00:00"\n',
            "resources.time_limit: must be a minute at least",
        ),
        ("[resources]\ntime_limit = 30\n", "resources.time_limit: "),
        ("[resources]\ncpus = 0\n", "resources.cpus: "),
        ('[resources]\npartition = "a b"\n', "resources.partition: "),
        (
            "[resources]\nsbatch = { array = 3 }\n",
            "resources.sbatch: 'array' is set by another key or by the executor itself",
        ),
        ("runs_per_gpu = 0\n", "runs_per_gpu: "),
        ("[retries]\ncrashed = -1\n", "retries.crashed: "),
        ("[polling]\nqueue_seconds = 0\n", "polling.queue_seconds: "),
        ('[environment]\n"a b" = "c"\n', "environment.a b"),
        ("runs_per_gpu = \n", "cannot be read as TOML"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, text, complaint):
    with pytest.raises(UserError) as caught:
        load(tmp_path, text)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'cluster.toml'}: ")
    assert complaint in message
    assert "\n" not in message


def test_a_missing_file_leads_to_the_examples(tmp_path):
    with pytest.raises(UserError, match=r"no such file; slurm/clusters/ has examples"):
        load_cluster(tmp_path / "none.toml")
