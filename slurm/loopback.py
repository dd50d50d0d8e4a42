"""A real two-node Slurm on this machine's loopback, for tests: ``up``, ``down``, ``run COMMAND``.

Everything of it lives in one folder: configuration, MUNGE key and socket, MariaDB's data, logs,
and the list of the processes started. It listens on 127.0.0.1 and on ports that were free, so it
keeps off any cluster this machine belongs to, and ``down`` ends what ``up`` started and nothing
else. It needs no root and no systemd, only Debian's packages (see ``MISSING``).
"""

import argparse
import contextlib
import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = ("slurmctld", "slurmd", "slurmdbd", "munged", "mariadbd", "sbatch", "sacctmgr")
MISSING = "apt-get install slurm-wlm slurmctld slurmd slurm-client slurmdbd munge mariadb-server"
NODES = ("n1", "n2")
_CLUSTER = "pof"
_PATIENCE = 60.0


class ClusterError(Exception):
    """Something stands in the way, in one line."""


def default_folder() -> Path:
    """One folder a checkout; short, because the path of a socket may not be long."""
    mark = sha256(str(ROOT).encode()).hexdigest()[:8]
    return Path(tempfile.gettempdir()) / f"pof-slurm-{os.getuid()}-{mark}"


def hint() -> str:
    """One line for those who have not run the tests on a real Slurm."""
    if absent := missing_programs():
        return (
            f"skipped: the tests on a real Slurm ({', '.join(absent)} not installed). "
            f"To have them: {MISSING}, then make test-slurm"
        )
    return "not among these: the tests on a real Slurm, which `make test-slurm` runs"


def missing_programs() -> list[str]:
    """Programs that the cluster needs and this machine lacks."""
    path = os.environ.get("PATH", os.defpath) + os.pathsep + "/usr/sbin:/sbin"
    return [name for name in PROGRAMS if shutil.which(name, path=path) is None]


@dataclass(frozen=True)
class Cluster:
    """A cluster of its own.

    Attributes:
        folder: Of everything it is made of.
        accounting: Whether slurmdbd keeps accounts; without, ``sacct`` fails.
    """

    folder: Path
    accounting: bool = True

    @property
    def configuration(self) -> Path:
        """What ``SLURM_CONF`` must name for a shell to talk to this cluster."""
        return self.folder / "slurm.conf"

    def environment(self, base: Mapping[str, str] = os.environ) -> dict[str, str]:
        """An environment in which Slurm's commands talk to this cluster and no other."""
        outer = {k: v for k, v in base.items() if not k.startswith(("SLURM", "SBATCH", "SQUEUE"))}
        path = base.get("PATH", os.defpath) + os.pathsep + "/usr/sbin" + os.pathsep + "/sbin"
        return outer | {"SLURM_CONF": str(self.configuration), "PATH": path}

    def up(self) -> None:
        """Start every daemon and wait until both nodes are idle.

        Raises:
            ClusterError: Programs are missing, or a daemon did not come up.
        """
        if absent := missing_programs():
            raise ClusterError(f"not installed: {', '.join(absent)}. To have them: {MISSING}")
        if self._alive():
            raise ClusterError(f"{self.folder}: this cluster is up already; take it down first")
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True, mode=0o755)
        self._configure()
        try:
            self._start_munge()
            if self.accounting:
                self._start_accounting()
            self.start("slurmctld")
            for node in NODES:
                self.start(node)
            _until("both nodes are idle", self._nodes_idle)
        except BaseException:
            self.down(keep_folder=True)
            raise

    def down(self, *, keep_folder: bool = False) -> None:
        """End the jobs and daemons of this cluster, and those alone."""
        if "slurmctld" in self._alive():
            with contextlib.suppress(ClusterError):
                self.command("scancel", f"--user={os.getuid()}")
                self.command("scancel", f"--user={os.getuid()}", "--signal=KILL", "--full")
                _until("the jobs have ended", lambda: not self.command("squeue", "-h"), 15)
        for name in reversed(list(self._recorded())):
            self.stop(name)
        for pid in self._stray_steps():
            _end(pid, signal.SIGKILL)
        if not keep_folder:
            shutil.rmtree(self.folder, ignore_errors=True)

    def start(self, name: str) -> None:
        """Start one daemon: ``slurmctld``, ``slurmdbd`` or a node's slurmd by the node's name."""
        program = ["slurmd", "-D", "-N", name] if name in NODES else [name, "-D"]
        self._spawn(name, program)

    def stop(self, name: str, number: signal.Signals = signal.SIGTERM) -> None:
        """End one daemon; jobs that a node's slurmd started live on."""
        recorded = self._recorded()
        pid, began = recorded.pop(name, (0, ""))
        if pid and _began(pid) == began:
            _end(pid, number)
        self._record(recorded)

    def command(self, *arguments: str) -> str:
        """The output of one of Slurm's commands.

        Raises:
            ClusterError: It failed.
        """
        done = subprocess.run(
            arguments, env=self.environment(), capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise ClusterError(f"{' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout.strip()

    # Its parts

    def _start_munge(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        options = {
            "key-file": key,
            "socket": self.folder / "munge.socket",
            "pid-file": self.folder / "munge.pid",
            "log-file": self.folder / "log" / "munged.log",
            "seed-file": self.folder / "munge.seed",
        }
        arguments = [f"--{name}={path}" for name, path in options.items()]
        self._spawn("munged", ["munged", "--foreground", "--force", *arguments])
        _until("munged answers", (self.folder / "munge.socket").exists)

    def _start_accounting(self) -> None:
        data, database = self.folder / "mariadb", self.folder / "mariadb.socket"
        user = pwd.getpwuid(os.getuid()).pw_name
        # A server that starts clears its temporary folder, another server's files among them.
        temporary = self.folder / "tmp"
        own = ["--no-defaults", f"--datadir={data}", f"--tmpdir={temporary}", f"--user={user}"]
        install = ["mariadb-install-db", *own, "--auth-root-authentication-method=socket"]
        with (self.folder / "log" / "mariadb-install.log").open("wb") as log:
            done = subprocess.run(
                [*install, f"--auth-root-socket-user={user}", "--skip-test-db"],
                stdout=log, stderr=log, env=self.environment(), check=False,
            )  # fmt: skip
        if done.returncode:
            raise ClusterError(f"mariadb-install-db failed: see {log.name}")
        frugal = ["--innodb-buffer-pool-size=64M", "--innodb-flush-log-at-trx-commit=0"]
        listen = ["--skip-networking", f"--socket={database}"]
        self._spawn(
            "mariadbd", ["mariadbd", *own, *listen, *frugal, "--innodb-lock-wait-timeout=900"]
        )
        client = ["mariadb", "--no-defaults", f"--socket={database}", "-e"]
        environment = self.environment()
        _until(
            "MariaDB answers",
            lambda: (
                not subprocess.run(
                    [*client, "select 1"], env=environment, capture_output=True, check=False
                ).returncode
            ),
        )
        grants = (
            "create database slurm_acct_db; create user 'slurm'@'localhost' identified by 'slurm';"
            "grant all on slurm_acct_db.* to 'slurm'@'localhost'"
        )
        subprocess.run([*client, grants], env=environment, check=True)
        self.start("slurmdbd")
        _until("slurmdbd has the cluster", self._register)

    def _register(self) -> bool:
        try:
            if _CLUSTER not in self.command("sacctmgr", "-n", "show", "cluster"):
                self.command("sacctmgr", "-i", "add", "cluster", _CLUSTER)
        except ClusterError:
            return False
        return True

    def _nodes_idle(self) -> bool:
        try:
            return self.command("sinfo", "-h", "-N", "-p", "main", "-o", "%t").split() == [
                "idle" for _ in NODES
            ]
        except ClusterError:
            return False

    def _configure(self) -> None:
        for name in ("log", "state", "run", "tmp", *(f"spool-{node}" for node in NODES)):
            (self.folder / name).mkdir()
        controller, database, *node_ports = _free_ports(2 + len(NODES))
        user, here = pwd.getpwuid(os.getuid()).pw_name, self.folder
        host = socket.gethostname().partition(".")[0]
        kept = (
            "slurmdbd\nAccountingStorageHost=127.0.0.1\n"
            f"AccountingStoragePort={database}\n"
            f"AccountingStoragePass={self.folder}/munge.socket"  # which munged to ask
            if self.accounting
            else "none"
        )
        nodes = "".join(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} "
            "CPUs=2 RealMemory=4000 Gres=gpu:1 State=UNKNOWN\n"
            for name, port in zip(NODES, node_ports, strict=True)
        )
        self.configuration.write_text(f"""\
ClusterName={_CLUSTER}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# A requeued job may start again once its old credential has expired: two minutes by default.
AuthInfo=socket={here}/munge.socket,cred_expire=5
CommunicationParameters=NoInAddrAny
StateSaveLocation={here}/state
SlurmdSpoolDir={here}/spool-%n
SlurmctldPidFile={here}/run/slurmctld.pid
SlurmdPidFile={here}/run/slurmd-%n.pid
SlurmctldLogFile={here}/log/slurmctld.log
SlurmdLogFile={here}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/{kept}
GresTypes=gpu
# Impatient, for tests.
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2,sched_min_interval=200000
SlurmctldTimeout=10
SlurmdTimeout=10
KillWait=15
# A step that ends while the controller is away retries for a while; its node must not be drained.
UnkillableStepTimeout=600
CompleteWait=0
MinJobAge=120
ReturnToService=2
MaxArraySize=1001
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}\
PartitionName=DEFAULT Nodes=ALL MaxTime=UNLIMITED DefMemPerCPU=500
PartitionName=main Default=YES PriorityTier=1 GraceTime=10
PartitionName=urgent PriorityTier=10
""")
        (here / "gres.conf").write_text("Name=gpu File=/dev/null\n")
        (here / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        secret = here / "slurmdbd.conf"
        secret.touch(mode=0o600)
        secret.write_text(f"""\
DbdHost={host}
DbdAddr=127.0.0.1
DbdPort={database}
SlurmUser={user}
AuthType=auth/munge
AuthInfo=socket={here}/munge.socket
StorageType=accounting_storage/mysql
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct_db
PidFile={here}/run/slurmdbd.pid
LogFile={here}/log/slurmdbd.log
""")

    # Its processes: name → (pid, when it began), so that a pid used anew is never signalled

    def _spawn(self, name: str, program: list[str]) -> None:
        # libmariadb, and so slurmdbd, reads the place of the socket from MYSQL_UNIX_PORT.
        environment = self.environment() | {"MYSQL_UNIX_PORT": str(self.folder / "mariadb.socket")}
        with (self.folder / "log" / f"{name}.out").open("ab") as log:
            process = subprocess.Popen(
                program, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True, cwd=self.folder,
            )  # fmt: skip
        self._record(self._recorded() | {name: (process.pid, _began(process.pid))})

    def _recorded(self) -> dict[str, tuple[int, str]]:
        path = self.folder / "processes.json"
        content = json.loads(path.read_text()) if path.exists() else {}
        return {name: (pid, began) for name, (pid, began) in content.items()}

    def _record(self, processes: dict[str, tuple[int, str]]) -> None:
        if self.folder.exists():
            (self.folder / "processes.json").write_text(json.dumps(processes))

    def _alive(self) -> list[str]:
        return [name for name, (pid, began) in self._recorded().items() if _began(pid) == began]

    def _stray_steps(self) -> Iterator[int]:
        """Step managers of this cluster and what they run, that outlived their slurmd."""
        mark = f"SLURM_CONF={self.configuration}".encode()
        managers = set()
        parents: dict[int, int] = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    parents[int(entry.name)] = int(_stat(int(entry.name))[1])
                    is_manager = (entry / "comm").read_text().strip() == "slurmstepd"
                    if is_manager and mark in (entry / "environ").read_bytes().split(b"\0"):
                        managers.add(int(entry.name))
        for pid in parents:
            ancestor = pid
            while ancestor > 1 and ancestor not in managers:
                ancestor = parents.get(ancestor, 0)
            if ancestor in managers:
                yield pid


def _stat(pid: int) -> list[str]:
    """The fields of ``/proc/PID/stat`` after the program's name; empty if it is gone."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _began(pid: int) -> str:
    """When a process began, in the kernel's clock; empty if it is gone or a zombie."""
    try:
        fields = _stat(pid)
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]


def _end(pid: int, number: signal.Signals) -> None:
    """Signal a process, wait for its end, and insist."""
    began = _began(pid)
    for attempt in (number, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, attempt)
        with contextlib.suppress(ClusterError):
            _until("it ended", lambda: _began(pid) != began or _reap(pid), 20)
            return


def _reap(pid: int) -> bool:
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:
        return False


def _until(what: str, holds: Callable[[], bool], patience: float = _PATIENCE) -> None:
    deadline = time.monotonic() + patience
    while not holds():
        if time.monotonic() > deadline:
            raise ClusterError(f"waited {patience:.0f} s in vain until {what}")
        time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, help="where everything of the cluster lives")
    parser.add_argument("--no-accounting", action="store_true", help="without slurmdbd")
    parser.add_argument("action", choices=["up", "down", "status", "run", "hint"])
    parser.add_argument("command", nargs=argparse.REMAINDER, help="with run: what, on a cluster")
    options = parser.parse_args()
    if options.action == "hint":
        print(hint())
        return
    own = options.action == "run" and options.folder is None
    folder = Path(tempfile.mkdtemp(prefix="pof-slurm-")) if own else options.folder
    cluster = Cluster(folder or default_folder(), accounting=not options.no_accounting)
    try:
        sys.exit(_act(cluster, options.action, options.command))
    except KeyboardInterrupt:
        sys.exit(130)
    except ClusterError as error:
        print(f"error: {error} (its logs: {cluster.folder}/log)", file=sys.stderr)
        sys.exit(1)


def _act(cluster: Cluster, action: str, command: list[str]) -> int:
    if action == "up":
        cluster.up()
        print(f"up. To use it from a shell: export SLURM_CONF={cluster.configuration}")
    elif action == "down":
        cluster.down()
    elif action == "status":
        print(cluster.command("sinfo"))
    else:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        cluster.up()
        try:
            environment = cluster.environment() | {"POF_LOOPBACK": str(cluster.folder)}
            return subprocess.run(command, env=environment, check=False).returncode
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):  # no impatience leaves daemons behind
                signal.signal(number, signal.SIG_IGN)
            cluster.down()
    return 0


if __name__ == "__main__":
    main()
