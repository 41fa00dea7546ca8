"""Remote bytes: whole and unchanged through cuts, refusals and silence, or lost with the reason said."""

import os
import pickle
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from multiprocessing import get_context
from pathlib import Path

import fsspec
import numpy as np
import pytest

from fd_scale.data import remote as remote_module
from fd_scale.data.faults import LostShardError
from fd_scale.data.openers import Http
from fd_scale.data.remote import Limits, Patience, Remote
from fd_scale.errors import ShardError
from tests.data.server import HASTE, Server, serving

SIZE = 300_000


@pytest.fixture
def content(tmp_path) -> bytes:
    made = np.random.default_rng(0).integers(0, 256, SIZE, dtype=np.uint8).tobytes()
    (tmp_path / "x.tar").write_bytes(made)
    return made


@pytest.fixture
def server(tmp_path, content):
    with serving(tmp_path) as running:
        yield running


def fetch(server: Server, begin: int = 0, end: int = SIZE, size: int = SIZE, name: str = "x.tar") -> bytes:
    return Remote(HASTE).read(f"{server.url}/{name}", begin, end, size)


@pytest.mark.parametrize("ranges", [True, False])
def test_any_range_is_read(server, content, ranges):
    server.ranges = ranges
    remote = Remote(HASTE)
    url = f"{server.url}/x.tar"
    assert remote.size(url) == SIZE
    for begin, end in ((0, SIZE), (0, 1), (5, 9), (SIZE - 1, SIZE), (100_000, 250_000), (250_000, 260_000)):
        assert remote.read(url, begin, end, SIZE) == content[begin:end]
    assert b"".join(remote.stream(url, 7, SIZE, SIZE)) == content[7:]


def test_nothing_more_than_the_range_is_asked_for(server):
    fetch(server, 1000, 2000)
    assert server.requests == [("/x.tar", "bytes=1000-1999")]


def test_a_server_without_ranges_is_read_on_where_it_stood(server, content):
    server.ranges = False
    remote = Remote(HASTE)
    url = f"{server.url}/x.tar"
    for begin in range(0, SIZE, 50_000):
        assert remote.read(url, begin, begin + 20_000, SIZE) == content[begin : begin + 20_000]
    assert len(server.requests) == 3  # the second shows that it knows no ranges, the third is read on
    assert remote.read(url, 10, 20, SIZE) == content[10:20]
    assert len(server.requests) == 4


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("cuts", [1, 3, 20])
def test_a_transfer_that_breaks_is_taken_up_where_it_stopped(server, content, ranges, cuts):
    server.ranges, server.cut_after, server.cuts = ranges, 100_000, cuts if ranges else min(cuts, 3)
    assert fetch(server) == content
    if ranges:
        assert server.requests[1] == ("/x.tar", f"bytes=100000-{SIZE - 1}")


def test_a_server_that_always_breaks_at_one_place_is_given_up(server):
    server.ranges, server.cut_after, server.cuts = False, 100_000, 99
    with pytest.raises(
        LostShardError, match=r"/x\.tar: given up after 4 attempts: .*(IncompleteRead|too early)"
    ):
        fetch(server)


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_what_may_pass_is_asked_again(server, content, status):
    server.status, server.refuse_first = status, 3
    assert fetch(server) == content
    assert len(server.requests) == 4
    server.refuse_first = 99
    with pytest.raises(LostShardError, match=rf"given up after 4 attempts: HTTP {status}"):
        fetch(server)
    server.refuse_first = 2
    assert Remote(HASTE).size(f"{server.url}/x.tar") == SIZE


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_what_is_forbidden_or_absent_is_asked_once(server, status):
    server.status, server.refuse_first = status, -1
    with pytest.raises(LostShardError, match=rf"/x\.tar: HTTP {status}"):
        fetch(server)
    with pytest.raises(LostShardError, match=rf"/x\.tar: HTTP {status}"):
        Remote(HASTE).size(f"{server.url}/x.tar")
    assert len(server.requests) == 2


@pytest.mark.parametrize("ranges", [True, False])
def test_another_size_is_refused_at_once(server, ranges):
    server.ranges = ranges
    with pytest.raises(LostShardError, match="it has 300,000 bytes, 300,001 when it was indexed"):
        fetch(server, 0, 10, SIZE + 1)
    server.page = b"<html>please log in</html>"
    with pytest.raises(LostShardError, match="it has 26 bytes, 300,000 when it was indexed"):
        fetch(server, 0, 10)
    assert len(server.requests) == 2


def test_a_silent_server_is_given_up(server):
    server.stall = True
    begin = time.monotonic()
    with pytest.raises(LostShardError, match=r"(Read timed out|ReadTimeout)"):
        fetch(server)
    # Four attempts of half a second each: the ten bytes that come with every answer are no progress.
    assert time.monotonic() - begin < 20


def test_a_server_that_crawls_is_given_up_and_a_slow_one_is_not(server, content):
    server.bytes_per_s = 2_000  # of 20,000 that are demanded
    broken = Http(Limits(1, 0.3, 20_000))
    with pytest.raises(remote_module.BrokenError, match=r"only \d,?\d+ bytes/s"):
        list(broken.pieces(f"{server.url}/x.tar", 0, SIZE, SIZE))
    server.bytes_per_s = 400_000
    assert fetch(server) == content


def test_nobody_there_is_given_up():
    with pytest.raises(LostShardError, match=r"given up after 4 attempts: .*[Rr]efused"):
        Remote(HASTE).read("http://127.0.0.1:9/x.tar", 0, 10, 10)


def test_pauses_grow_with_jitter_up_to_a_limit():
    patience = Patience(first_pause_s=1, longest_pause_s=20)
    for failures, longest in ((1, 1), (2, 2), (3, 4), (5, 16), (6, 20), (60, 20)):
        pauses = [patience.pause_s(failures) for _ in range(200)]
        assert longest / 2 <= min(pauses) <= max(pauses) <= longest
        assert len(set(pauses)) > 100
    assert patience.pause_s(1, asked_s=7) == 7
    assert patience.pause_s(1, asked_s=1e6) == 20


def test_a_pause_that_the_server_asks_for_is_kept(server):
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    for text, seconds in (("7", 7), (date, 29), ("soon", 0), ("", 0)):
        server.refuse_first, server.retry_after = 1, text
        with pytest.raises(remote_module.BrokenError) as caught:
            list(Http(Limits()).pieces(f"{server.url}/x.tar", 0, SIZE, SIZE))
        assert seconds - 2 <= caught.value.pause_s <= seconds + 2


def test_faults_of_many_shards_are_found_in_order(server):
    urls = [f"{server.url}/{name}" for name in ("x.tar", "absent.tar", "x.tar")]
    faults = Remote(HASTE).faults(urls, [SIZE, SIZE, 5])
    assert faults[0] == ""
    assert faults[1].endswith("absent.tar: HTTP 404 Not Found")
    assert faults[2].endswith("x.tar: 300,000 bytes, 5 when it was indexed")


# Commands.


def test_a_command_is_run_only_where_that_was_allowed(tmp_path):
    url = f"pipe:touch {tmp_path}/hacked"
    for use in (lambda r: r.read(url, 0, 1, 1), lambda r: r.size(url), lambda r: r.check([url])):
        with pytest.raises(ShardError, match=r"names 'pipe:touch .* run\.allow_pipe=true"):
            use(Remote(HASTE))
    assert not (tmp_path / "hacked").exists()


def test_the_output_of_a_command_is_read_on_where_it_stood(tmp_path, content):
    url = f"pipe:echo run >> {tmp_path}/runs; cat {tmp_path}/x.tar"
    remote = Remote(HASTE, allow_pipe=True)
    assert remote.size(url) is None
    for begin in range(0, SIZE, 60_000):
        assert remote.read(url, begin, begin + 1000, SIZE) == content[begin : begin + 1000]
    assert (tmp_path / "runs").read_text() == "run\n"
    assert remote.read(url, 5, SIZE, SIZE) == content[5:]
    assert (tmp_path / "runs").read_text() == "run\n" * 2


def test_bytes_that_came_before_a_command_failed_are_not_lost(tmp_path, content):
    remote = Remote(HASTE, allow_pipe=True)
    assert remote.read(f"pipe:cat {tmp_path}/x.tar; exit 3", 0, SIZE, SIZE) == content
    with pytest.raises(
        LostShardError, match="given up after 4 attempts: the command ended too early, with status 3"
    ):
        remote.read(f"pipe:head -c 1000 {tmp_path}/x.tar; exit 3", 500, SIZE, SIZE)
    with pytest.raises(LostShardError, match=r"the command was silent for 0\.5 s"):
        remote.read("pipe:sleep 20", 0, 10, SIZE)


def test_a_command_that_is_not_needed_any_more_is_ended(tmp_path, content):
    url = f"pipe:echo $$ > {tmp_path}/id; cat {tmp_path}/x.tar; sleep 60"
    pieces = Remote(HASTE, allow_pipe=True).stream(url, 0, SIZE, SIZE)
    next(pieces)
    process = int((tmp_path / "id").read_text())
    pieces.close()
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


# Object stores.


def test_a_store_is_read_by_ranges(content, monkeypatch):
    monkeypatch.setattr("fd_scale.data.openers._RANGE", 70_000)
    fsspec.filesystem("memory", skip_instance_cache=True).pipe("/bucket/x.tar", content)
    remote = Remote(HASTE)
    assert remote.size("memory://bucket/x.tar") == SIZE
    for begin, end in ((0, SIZE), (5, 9), (69_999, 140_001)):
        assert remote.read("memory://bucket/x.tar", begin, end, SIZE) == content[begin:end]
    with pytest.raises(LostShardError, match=r"absent\.tar: FileNotFoundError"):
        remote.read("memory://bucket/absent.tar", 0, 5, SIZE)


def test_a_store_without_its_package_says_what_to_install():
    with pytest.raises(LostShardError, match=r"nosuchstore://b/x: .*nosuchstore"):
        Remote(HASTE).size("nosuchstore://b/x")


def test_urls_of_this_machine_are_refused():
    for url in ("file:///etc/passwd", "local://x", "zip://a::file:///x.zip"):
        with pytest.raises(ShardError, match="give a path, or a URL of"):
            Remote(HASTE).read(url, 0, 1, 1)


# Processes.


def read_in_fork(remote: Remote, url: str, begin: int) -> bytes:
    return remote.read(url, begin, begin + 10, SIZE)


def test_forks_and_copies_have_connections_of_their_own(server, content):
    server.ranges = False
    remote = Remote(HASTE)
    url = f"{server.url}/x.tar"
    assert remote.read(url, 0, 1000, SIZE) == content[:1000]
    with get_context("fork").Pool(2) as pool:
        found = pool.starmap(read_in_fork, [(remote, url, begin) for begin in (2000, 3000)])
        assert found == [content[2000:2010], content[3000:3010]]
    assert remote.read(url, 4000, 5000, SIZE) == content[4000:5000]
    copy = pickle.loads(pickle.dumps(Remote(HASTE, allow_pipe=True)))
    assert (copy.patience, copy.allow_pipe) == (HASTE, True)


def test_jitter_takes_nothing_from_the_random_numbers_of_a_run():
    import random

    state = random.getstate()
    Patience().pause_s(3)
    assert random.getstate() == state
    assert Path(remote_module.__file__).read_text().count("random.Random()") == 1
