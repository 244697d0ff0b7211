"""Two hosts, as network namespaces, whose names resolve to a loopback address on themselves, as Debian has it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0 or shutil.which("ip") is None, reason="makes network namespaces, as root"),
]

RANK = """
import os, sys
from aimscale.harness.distributed import meeting
from aimscale.harness.distributed.group import LaunchError, find_placement, start_group, stop_group

meeting.RENDEZVOUS_TIMEOUT_S = float(sys.argv[1])
try:
    group = start_group(find_placement(), "cpu")
    print(os.environ["GLOO_SOCKET_IFNAME"], sum(group.all_gather_object(group.rank + 1)))
    stop_group()
except LaunchError as error:
    print(error)
"""
Ranks = Callable[..., list[str]]


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def on_two_hosts(tmp_path: Path) -> Iterator[Ranks]:
    """Return a function that runs a rank on each of two hosts, node0 and node1, and returns what they print.

    Its arguments are the seconds in which they are to meet, and variables of the environment.
    """
    spaces = [f"aimscale-{os.getpid()}-{i}" for i in range(2)]
    hosts = [Path("/etc/netns", space, "hosts") for space in spaces]
    try:
        ip("netns", "add", spaces[0])
    except subprocess.CalledProcessError:
        pytest.skip("cannot make network namespaces")
    try:
        ip("netns", "add", spaces[1])
        ip("link", "add", "cable0", "netns", spaces[0], "type", "veth", "peer", "name", "cable1", "netns", spaces[1])
        for i, space in enumerate(spaces):
            for words in (f"addr add 10.77.0.{i + 1}/24 dev cable{i}", f"link set cable{i} up", "link set lo up"):
                ip("-n", space, *words.split())
            hosts[i].parent.mkdir(parents=True)
            hosts[i].write_text(f"127.0.0.1 localhost\n127.0.1.1 node{i}\n10.77.0.{2 - i} node{1 - i}\n")

        def run(seconds: float, **variables: str) -> list[str]:
            group = {"WORLD_SIZE": "2", "MASTER_ADDR": "node0", "MASTER_PORT": "29500", "OMP_NUM_THREADS": "1"}
            ranks = []
            for i, space in enumerate(spaces):
                program = ["unshare", "--uts", "sh", "-c", f'hostname node{i} && exec "$@"', "sh", sys.executable]
                environment = os.environ | group | {"RANK": str(i)} | variables
                command = ["ip", "netns", "exec", space, *program, "-c", RANK, str(seconds)]
                ranks.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
            try:
                return [rank.communicate()[0].strip() for rank in ranks]
            finally:
                for rank in ranks:
                    rank.kill()

        yield run
    finally:
        for space, file in zip(spaces, hosts, strict=True):
            shutil.rmtree(file.parent, ignore_errors=True)
            subprocess.run(["ip", "netns", "del", space], check=False, capture_output=True)


@pytest.mark.parametrize("address", ["node0", "10.77.0.1"])
def test_hosts_whose_names_are_loopback_at_home_meet(on_two_hosts: Ranks, address: str) -> None:
    assert on_two_hosts(120, MASTER_ADDR=address) == ["cable0 3", "cable1 3"]


def test_nodes_that_are_one_host_meet_on_loopback() -> None:
    """Each waited for an address that a rank elsewhere would have told."""
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29511", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RANK, "60"]
    ranks = [
        subprocess.Popen(command, env=os.environ | group | {"RANK": str(i)}, stdout=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    try:
        assert [rank.communicate()[0].strip() for rank in ranks] == ["lo 3", "lo 3"]
    finally:
        for rank in ranks:
            rank.kill()


@pytest.mark.parametrize(("variable", "value"), [("MASTER_ADDR", "10.77.0.9"), ("GLOO_SOCKET_IFNAME", "lo")])
def test_hosts_that_do_not_meet_name_the_interface(on_two_hosts: Ranks, variable: str, value: str) -> None:
    said = on_two_hosts(20, **{variable: value})
    for i, sentence in enumerate(said):
        name = "lo" if variable == "GLOO_SOCKET_IFNAME" else f"cable{i}"
        where = "10.77.0.9" if variable == "MASTER_ADDR" else "node0"
        assert sentence.startswith(f"rank {i} on node{i} did not meet the others at {where}:29500 by network interface")
        assert f" interface {name} (" in sentence
        assert "\n" not in sentence
