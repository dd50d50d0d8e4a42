"""A list of profiles in pieces of limited time: interrupted, packed, unpacked, gone on with."""

import signal
import tarfile

import pytest

from benchmarks import campaign, measure
from benchmarks import plan as planning
from benchmarks.campaign import Places
from benchmarks.errors import UserError
from benchmarks.files import write_json
from benchmarks.settings import profile_name
from benchmarks.store import State, Store
from tests.harness import finish, make_plan, profile_file, record

ONE = {"methods": ["sgd"], "training": {"epochs": 1, "post_epochs": 0}}
LONG = {"methods": ["sgd"], "training": {"epochs": 40, "post_epochs": 1}}
OPTIONS = ["--jobs", "1", "--device", "cpu"]


def places(folder):
    return Places(folder / "data", folder / "runs", folder / "results")


def plan_of(where, profile):
    return planning.read(planning.file_of(where.runs_dir, profile_name(profile)))


def states(where, profile):
    return list(Store(where.runs_dir).states(plan_of(where, profile)).values())


def test_it_stops_when_time_is_up_and_goes_on_elsewhere_to_the_same_bits(tmp_path):
    short = str(profile_file(tmp_path, ONE))
    long = str(profile_file(tmp_path, LONG, name="long"))
    here, there = places(tmp_path / "here"), places(tmp_path / "there")
    said = []

    def out_of_time():
        return any(here.runs_dir.glob("digits-*-0-40-*/progress.json"))

    assert not campaign.carry_on(
        [short, long], here, out_of_time=out_of_time, options=OPTIONS, tell=said.append
    )
    assert said == [f"time is up in {long}: the same command goes on from here"]
    assert set(states(here, short)) == {State.DONE}
    assert states(here, long) == [State.INTERRUPTED, State.PENDING]
    assert (here.results_dir / "tiny" / "hessian.csv").exists()  # trained and measured
    assert (here.results_dir / "long" / "README.md").exists()  # published so far

    archive = tmp_path / "runs.tar"
    assert campaign.pack([short, long], here, archive, megabytes=60.0) == []
    there.runs_dir.mkdir(parents=True)
    with tarfile.open(archive) as tar:
        tar.extractall(there.runs_dir, filter="data")
    for profile in (short, long):
        assert states(there, profile) == states(here, profile)

    assert campaign.carry_on(
        [short, long], there, out_of_time=lambda: False, options=OPTIONS, tell=said.append
    )
    assert set(states(there, long)) == {State.DONE}
    (trained,), (went_on, _) = plan_of(there, short).runs, plan_of(there, long).runs
    store = Store(there.runs_dir)
    assert record(store, trained) == record(Store(here.runs_dir), trained)
    assert store.folder(trained).result()["starts"] == 1  # carried over, not trained again
    assert store.folder(went_on).result()["starts"] == 2


def test_what_unfinished_runs_need_is_packed_first(tmp_path):
    where = places(tmp_path)
    profile = str(profile_file(tmp_path))
    plan, store = make_plan(tmp_path), Store(where.runs_dir)
    plan.write(planning.file_of(where.runs_dir, "tiny"))
    sgd, sgd_on, sam, sam_on, pof = plan.runs
    for run in (sgd, sgd_on, sam, sam_on):
        finish(store, run, 1.0)
        (store.folder(run).path / "filling").write_bytes(bytes(400_000))
    archive = tmp_path / "runs.tar"
    left_out = campaign.pack([profile], where, archive, megabytes=0.5)
    assert sorted(left_out) == sorted(run.name for run in (sgd, sgd_on, sam_on))
    with tarfile.open(archive) as tar:
        names = tar.getnames()
    assert f"{sam.name}/result.json" in names  # PoF is pending and starts from it
    assert "plans/tiny.json" in names
    assert not [name for name in names if name.startswith(pof.name)]
    assert (
        archive.stat().st_size
        < 0.5e6 + 10_240 + planning.file_of(where.runs_dir, "tiny").stat().st_size
    )


def test_finished_runs_travel_as_records_unless_another_profile_starts_from_them(
    tmp_path, monkeypatch
):
    where = places(tmp_path)
    profile = str(profile_file(tmp_path))
    plan, store = make_plan(tmp_path), Store(where.runs_dir)
    plan.write(planning.file_of(where.runs_dir, "tiny"))
    for run in plan.runs:
        finish(store, run, 1.0)
        folder = store.folder(run)
        for name in ("e0001-s000000-a.pt", "e0002-s000000-b.pt"):
            path = folder.path / "checkpoints" / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(bytes(400_000))
        made = folder.path / "measurements" / "range-test.json"  # of the eight
        write_json(made, {})
    unmeasured = set[str]()
    monkeypatch.setattr(
        measure, "missing", lambda folder, _: ["a"] if folder.path.name in unmeasured else []
    )
    _, sgd_on, sam, *_ = plan.runs

    def packed(*profiles, megabytes=60.0):
        archive = tmp_path / "runs.tar"
        left_out = campaign.pack(profiles, where, archive, megabytes=megabytes)
        with tarfile.open(archive) as tar:
            names = tar.getnames()
        assert {f"{run.name}/result.json" for run in plan.runs} <= set(names)
        assert f"{sgd_on.name}/measurements/range-test.json" in names
        assert archive.stat().st_size <= megabytes * 1e6
        return [name for name in names if name.endswith(".pt")], left_out

    assert packed(profile) == ([], [])
    newest = "checkpoints/e0002-s000000-b.pt"
    unmeasured.add(sgd_on.name)  # or partly measured: the rest needs its checkpoint
    assert packed(profile) == ([f"{sgd_on.name}/{newest}"], [])
    unmeasured.clear()
    changes = {"methods": ["sam+more"], "variants": {"more": {"gamma": 3.0}}}
    later = str(profile_file(tmp_path, changes, name="later"))  # has no plan yet
    assert packed(profile, later) == ([f"{sam.name}/{newest}"], [])


def test_a_wrong_profile_is_refused_before_anything_starts(tmp_path):
    with pytest.raises(UserError, match="no profile 'gpu-fashon'"):
        campaign.carry_on(
            ["smoke", "gpu-fashon"],
            places(tmp_path),
            out_of_time=lambda: pytest.fail("it began"),
            tell=print,
        )
    assert not list(tmp_path.iterdir())


def test_speed_comes_first_and_what_is_left_of_it_goes_on_the_next_time(tmp_path, monkeypatch):
    where = places(tmp_path)
    profile = str(profile_file(tmp_path, ONE))
    commands, endings = [], iter([None, 1, 0, 0, 0])

    def run(command, out_of_time):
        commands.append(list(command))
        return next(endings)

    monkeypatch.setattr(campaign, "_run", run)

    def carry_on(**more):
        said = []
        complete = campaign.carry_on(
            [profile], where, out_of_time=lambda: False, options=OPTIONS, tell=said.append, **more
        )
        return complete, said

    speed = ["sam-step", "--device", "cpu"]
    said = "time is up in the rows of speed: the same command goes on from here"
    assert carry_on(speed=speed) == (False, [said])
    assert carry_on(speed=speed) == (False, [])  # a row broke off: the profile had its turn
    assert carry_on(speed=speed) == (True, [])
    assert [c[0] for c in commands] == ["speed", "speed", "hessian", "speed", "hessian"]
    first, _, second, *_ = commands
    assert first[:3] == ["speed", "--new", "sam-step"]
    assert set(first[3:]) <= set(where.options()) | set(speed)
    assert second[1:3] == ["--profile", profile]
    assert not [c for c in commands if c[0] == "speed" and "--runs-dir" in c]


def test_the_rows_of_a_gpu_are_all_there():
    from benchmarks.speed import accelerator, suite

    names = {row.name for row, _ in suite.choose(campaign.SPEED, "cuda")}
    assert names == set(campaign.SPEED)
    assert names >= {row.name for row in accelerator.ROWS}
    assert suite.choose(campaign.SPEED, "cpu")


def test_a_copy_without_git_says_its_revision(monkeypatch):
    from benchmarks import environment

    monkeypatch.setattr(environment, "_git", lambda *_: None)
    monkeypatch.setenv(environment.REVISION_VARIABLE, "abc123")
    assert environment.code_revision() == {"revision": "abc123", "dirty": None}
    monkeypatch.delenv(environment.REVISION_VARIABLE)
    assert environment.code_revision() == {"revision": None, "dirty": None}


def test_the_command_packs_runs_and_results_whether_complete_or_not(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from benchmarks.cli import app

    where, asked = places(tmp_path), []
    profile = str(profile_file(tmp_path))
    (where.results_dir / "tiny").mkdir(parents=True)
    (where.results_dir / "tiny" / "errors.csv").write_text("a,b\n")
    monkeypatch.setattr(campaign, "carry_on", lambda *_, **named: asked.append(named["speed"]))
    handler = signal.getsignal(signal.SIGTERM)
    packs = ["--pack", str(tmp_path / "runs.tar"), "--pack-results", str(tmp_path / "results.gz")]
    try:
        for chosen in ([], ["--row", "pair"], ["--no-speed"]):
            command = ["campaign", profile, "--device", "cpu", *chosen, *packs, *where.options()]
            assert CliRunner().invoke(app, command).exit_code == 1
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert asked == [[*campaign.SPEED, "--device", "cpu"], ["pair", "--device", "cpu"], None]
    with tarfile.open(tmp_path / "results.gz") as tar:
        assert tar.getnames() == ["tiny/errors.csv"]
    assert (tmp_path / "runs.tar").exists()
