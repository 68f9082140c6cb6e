"""Hosts for cluster tests on one Linux machine: namespaces with a network address, processes, /tmp and home of their own.

Each runs an sshd, and sees the rest of this machine's files as they are. Needs root, iproute2 and openssh-server.
"""

import os
import shlex
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType

_BRIDGE = "orthrus0"
_GATEWAY = "10.77.77.1"
_PATH = "PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def missing_programs() -> list[str]:
    """What has to be installed first, as Debian packages; and root, where that is missing."""
    packages = {
        "ip": "iproute2",
        "/usr/sbin/sshd": "openssh-server",
        "ssh": "openssh-client",
        "rsync": "rsync",
    }
    lacking = [package for program, package in packages.items() if shutil.which(program) is None]
    return [*lacking, *(["root"] if os.geteuid() else [])]


class NetworkHosts:
    """A context with one host per name; `addresses` are reachable from here and from each other, by `key` over ssh.

    visible: a directory that hosts see at its own path even if it lies below /tmp, of which each has its own.
    """

    def __init__(self, names: list[str], visible: Path) -> None:
        self.state = Path(tempfile.mkdtemp(prefix="orthrus-hosts-", dir="/var/tmp"))
        self.key = self.state / "key"
        self.addresses = {name: f"10.77.77.{number}" for number, name in enumerate(names, 10)}
        self._visible = visible
        self._inits: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> "NetworkHosts":
        try:
            for key in (self.key, self.state / "host_key"):
                _run(f"ssh-keygen -q -t ed25519 -N '' -f {key}")
            _run(f"ip link add {_BRIDGE} type bridge")
            _run(f"ip addr add {_GATEWAY}/24 dev {_BRIDGE}")
            _run(f"ip link set {_BRIDGE} up")
            for name, address in self.addresses.items():
                self._start(name, address)
            for name in self.addresses:
                self._wait_for_ssh(name)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def kill(self, name: str) -> None:
        """End a host as a power cut does: every process of it at once."""
        init = self._inits.pop(name)
        init.kill()
        init.wait()

    def processes(self, name: str) -> list[str]:
        """Command lines of what runs on a host, its init and sshd left out."""
        pids = _run(f"ip netns pids {_namespace(name)}").split()
        lines = [_command_line(pid) for pid in pids]
        # The init's own command line, and unshare's which started it, name sshd too.
        return [line for line in lines if line and "sshd" not in line]

    def close(self) -> None:
        for name in list(self._inits):
            self.kill(name)
        for name in self.addresses:
            # By itself it goes only when the kernel has cleared the namespace away, some time later.
            _run(f"ip link del {_link(name)}", check=False)
            _run(f"ip netns del {_namespace(name)}", check=False)
        _run(f"ip link del {_BRIDGE}", check=False)
        shutil.rmtree(self.state, ignore_errors=True)

    def home(self, name: str) -> Path:
        return self.state / name / "home"

    def _start(self, name: str, address: str) -> None:
        namespace, inside, outside = _namespace(name), "eth0", _link(name)
        _run(f"ip netns add {namespace}")
        _run(f"ip link add {outside} type veth peer name {inside} netns {namespace}")
        _run(f"ip link set {outside} master {_BRIDGE} up")
        for command in (f"addr add {address}/24 dev {inside}", f"link set {inside} up", "link set lo up"):
            _run(f"ip -n {namespace} {command}")
        # Nothing is forwarded: Ray asks for the route to the internet to learn the host's own address.
        _run(f"ip -n {namespace} route add default via {_GATEWAY}")

        own, home = self.state / name, self.home(name)
        (home / ".ssh").mkdir(parents=True)
        (own / "tmp").mkdir(mode=0o1777)
        (home / ".ssh" / "authorized_keys").write_text((self.key.with_suffix(".pub")).read_text())
        (own / "passwd").write_text(
            f"root:*:0:0:root:{home}:/bin/bash\nsshd:x:100:65534::/run/sshd:/usr/sbin/nologin\n"
        )
        (own / "hosts").write_text(f"127.0.0.1 localhost\n{address} {name}\n")
        mounts = ["mount -t tmpfs tmpfs /dev/shm", "mkdir -p /run/sshd"]
        mounts += [f"mount --bind {own / file} /etc/{file}" for file in ("passwd", "hosts")]
        if self._visible.is_relative_to("/tmp"):
            kept = own / "tmp" / self._visible.relative_to("/tmp")
            mounts += [f"mkdir -p {kept}", f"mount --bind {self._visible} {kept}"]
        mounts.append(f"mount --rbind {own / 'tmp'} /tmp")
        sshd = (
            f"/usr/sbin/sshd -D -e -h {self.state / 'host_key'} -o UsePAM=no -o StrictModes=no "
            "-o PermitRootLogin=yes -o MaxStartups=100 -o MaxSessions=100"
        )
        # The shell stays as the namespace's init: it reaps what is orphaned there.
        script = f"set -e; hostname {name}; {'; '.join(mounts)}; cd {home}; {sshd} & wait"
        unshare = "unshare --mount --propagation private --uts --pid --fork --mount-proc --kill-child"
        log = (own / "sshd.log").open("wb")
        self._inits[name] = subprocess.Popen(
            [*f"ip netns exec {namespace} {unshare} env -i HOME={home} {_PATH} bash -c".split(), script],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
        log.close()

    def _wait_for_ssh(self, name: str) -> None:
        deadline = time.monotonic() + 20
        command = (
            f"ssh -i {self.key} -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR "
            f"-o BatchMode=yes -o ConnectTimeout=2 root@{self.addresses[name]} true"
        )
        while subprocess.run(shlex.split(command), capture_output=True).returncode:
            log = (self.state / name / "sshd.log").read_text()
            assert time.monotonic() < deadline and self._inits[name].poll() is None, log
            time.sleep(0.2)


def _namespace(name: str) -> str:
    return f"orthrus-{name}"


def _link(name: str) -> str:
    return f"o-{name}"[:15]


def _command_line(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    except OSError:
        return ""


def _run(command: str, *, check: bool = True) -> str:
    done = subprocess.run(shlex.split(command), capture_output=True, text=True)
    assert not check or done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout
