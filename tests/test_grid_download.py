"Fetching the corpus from a server that drops lines, is busy, ignores ranges and spoils zips: in fresh processes, killed ones too."
import contextlib
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import ROOT, run_avlab

NAMES = ("bbaf2n", "lwwz9s", "sbba2p")
LINES = "0 12250 sil\n12250 19250 set\n19250 27250 blue\n27250 35000 by\n35000 42000 a\n42000 49500 two\n49500 74500 please\n"


def noise(name, n=60_000):
    return hashlib.shake_256(name.encode()).digest(n)


def zipped(files):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as z:
        for name, content in files.items():
            z.writestr(name, content)
    return out.getvalue()


def corpus_zips(speakers=("s1", "s2"), n=60_000):
    videos = {f"{s}.zip": zipped({f"{s}/": b"", f"{s}/Thumbs.db": b"x", **{f"{s}/{name}.mpg": noise(s + name, n) for name in NAMES}}) for s in speakers}
    return {"alignments.zip": zipped({f"alignments/{s}/{name}.align": LINES for s in speakers for name in NAMES}), **videos}


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *a):
        pass

    def do_GET(self):
        s, wanted = self.server, self.headers.get("Range")
        name = self.path.split("/")[-2] if "/files/" in self.path else ""
        s.requests.append((name or "record", wanted))
        if s.busy:
            s.busy -= 1
            self.send_response(503)
            self.send_header("Retry-After", "0")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        body = s.zips.get(name) if name else s.record()
        if body is None:
            return self.send_error(404)
        if name.startswith("s") and s.spoilt:
            s.spoilt -= 1
            body = body[: len(body) // 2] + bytes(len(body) - len(body) // 2)
        start = int(wanted[6:-1]) if wanted and s.ranges else 0
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", len(body) - start)
        if s.ranges:
            self.send_header("ETag", '"v1"')
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.end_headers()
        end = start + s.drops.pop(0) if name.startswith("s") and s.drops else len(body)
        for i in range(start, min(end, len(body)), 1 << 14):
            self.wfile.write(body[i : min(i + (1 << 14), end)])
            time.sleep(s.slow_s)


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, zips=None, drops=(), ranges=True, busy=0, spoilt=0, listed=True, slow_s=0):
        super().__init__(("127.0.0.1", 0), Handler)
        self.zips, self.drops, self.ranges, self.busy, self.spoilt, self.listed, self.slow_s = zips or corpus_zips(), list(drops), ranges, busy, spoilt, listed, slow_s
        self.requests, self.url = [], f"http://127.0.0.1:{self.server_port}/records/1"

    def handle_error(self, *a):
        pass

    def record(self):
        rows = [{"key": n, "size": len(b), "checksum": "md5:" + hashlib.md5(b).hexdigest()} for n, b in self.zips.items()]
        return json.dumps({"files": rows}).encode() if self.listed else None


@contextlib.contextmanager
def serving(**trouble):
    with Server(**trouble) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()


def fetch(server, folder, *more, speakers=("s1", "s2"), **kw):
    return run_avlab("grid", "download", "--speakers", *speakers, "--dir", folder, "--base-url", server.url, *more, **kw)


def whole(folder, speakers=("s1", "s2")):
    "Every video and alignment is there, and nothing half."
    files = {str(p.relative_to(folder / "grid")): p for p in (folder / "grid").rglob("*") if p.is_file() and p.suffix in (".mpg", ".align")}
    wanted = {f"raw/{s}/{n}.mpg" for s in speakers for n in NAMES} | {f"alignments/{s}/{n}.align" for s in speakers for n in NAMES}
    left = [p for p in folder.rglob("*") if p.suffix in (".part", ".tag", ".zip")]
    return set(files) == wanted and not left and all(files[f"raw/{s}/{n}.mpg"].read_bytes() == noise(s + n, files[f"raw/{s}/{n}.mpg"].stat().st_size) for s in speakers for n in NAMES)


TROUBLE = dict(none={}, dropped=dict(drops=[70_000, 50_000, 20_000]), without_ranges=dict(drops=[70_000, 50_000], ranges=False), busy=dict(busy=2), spoilt=dict(spoilt=1))
TROUBLE |= dict(unlisted=dict(listed=False), unlisted_and_spoilt=dict(listed=False, spoilt=2), all_at_once=dict(drops=[70_000, 50_000], busy=2, spoilt=1))


@pytest.mark.parametrize("trouble", TROUBLE)
def test_in_the_end_all_is_there(tmp_path, trouble):
    with serving(**TROUBLE[trouble]) as server:
        done = fetch(server, tmp_path, "--json")
        assert done.returncode == 0, done.stderr
        assert whole(tmp_path)
        report = json.loads(done.stdout)
        assert (report["step"], report["done"], report["failed"]) == ("download", 3, [])
        asked = len(server.requests)
        again = fetch(server, tmp_path)
        assert (again.returncode, again.stderr) == (0, "") and "0 done, 3 were there" in again.stdout
        assert len(server.requests) == asked


def test_dropped_lines_go_on_from_where_they_broke(tmp_path):
    with serving(drops=[70_000, 50_000]) as server:
        assert fetch(server, tmp_path, speakers=["s1"]).returncode == 0
        ranges = [r for name, r in server.requests if name == "s1.zip"]
    starts = [int(r[6:-1]) for r in ranges[1:]]
    assert ranges[0] is None and len(starts) == 2 and starts == sorted(starts) and starts[0] >= 50_000


def test_dry_run_says_what_and_how_much(tmp_path):
    with serving() as server:
        done = fetch(server, tmp_path, "--dry-run", "--json")
        plan = json.loads(done.stdout)
        assert [(f["name"], f["action"], f["bytes"]) for f in plan["files"]] == [(n, "fetch", len(b)) for n, b in server.zips.items()]
        assert plan["bytes"] == sum(map(len, server.zips.values())) and not list(tmp_path.iterdir())
        assert [n for n, _ in server.requests] == ["record"]
        fetch(server, tmp_path, speakers=["s1"])
        said = fetch(server, tmp_path, "--dry-run").stdout
    assert "s2.zip" in said and "kB" in said and "2 of 3 left to do" in said


def test_a_zip_that_stays_spoilt_is_one_line_and_the_rest_is_done(tmp_path):
    zips = corpus_zips()
    zips["s1.zip"] = zips["s1.zip"][:90_000]
    with serving(zips=zips) as server:
        done = fetch(server, tmp_path)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1) and "s1.zip was fetched three times and is damaged" in done.stderr
        assert [n for n, _ in server.requests].count("s1.zip") == 3
    assert len(list((tmp_path / "grid" / "raw" / "s2").glob("*.mpg"))) == 3 and not list((tmp_path / "grid" / "zips").glob("*.zip"))


def test_a_speaker_that_the_record_does_not_hold(tmp_path):
    with serving() as server:
        done = fetch(server, tmp_path, speakers=["s3"])
    assert (done.returncode, done.stderr.count("\n")) == (1, 1) and "holds no s3.zip" in done.stderr and not list(tmp_path.iterdir())


def test_a_zip_that_climbs_out_is_refused(tmp_path):
    link = zipfile.ZipInfo("s1/bbaf2n.mpg")
    link.external_attr = 0o120777 << 16
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as z:
        z.writestr(link, "/etc/passwd")
    evil = dict(up=zipped({"s1/bbaf2n.mpg": b"x", "s1/../../../evil.mpg": b"x"}), root=zipped({"/evil.mpg": b"x"}), drive=zipped({"C:\\evil.mpg": b"x"}), link=out.getvalue())
    for why, body in evil.items():
        with serving(zips=corpus_zips() | {"s1.zip": body}) as server:
            done = fetch(server, tmp_path / why, speakers=["s1"])
        assert (done.returncode, done.stderr.count("\n")) == (1, 1) and "would leave its folder" in done.stderr, why
        assert not list((tmp_path / why / "grid").glob("raw/*/*.mpg"))
    assert not list(tmp_path.rglob("*evil*"))


@pytest.mark.parametrize("when", [0.3, 0.8, 1.4])
def test_a_killed_download_goes_on(tmp_path, when):
    "kill -9 in the middle: what was written is whole, and the next call fetches only the rest."
    zips = corpus_zips(n=400_000)
    with serving(zips=zips, slow_s=0.02) as server:
        command = [sys.executable, "-m", "avlab.app.cli", "grid", "download", "--speakers", "s1", "s2", "--dir", str(tmp_path), "--base-url", server.url]
        child = subprocess.Popen(command, env={**os.environ, "AVLAB_DOWNLOADS": "never", "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while child.poll() is None and not any(n == "s1.zip" for n, _ in server.requests):
            time.sleep(0.02)
        time.sleep(when)
        child.send_signal(signal.SIGKILL)
        child.wait()
        for p in (tmp_path / "grid").rglob("*.mpg"):
            assert p.read_bytes() == noise(p.parent.name + p.stem, 400_000)
        before, server.slow_s = len(server.requests), 0
        done = fetch(server, tmp_path)
        assert done.returncode == 0 and whole(tmp_path), done.stderr
        after = server.requests[before:]
    assert any(r for n, r in after if n.endswith(".zip"))


def test_a_full_disk_is_one_line_and_keeps_what_is_done(tmp_path):
    "A disk of 1 MB: s1 fits, s2 does not. With room again, only s2 is fetched."
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        with serving(zips=corpus_zips(n=120_000)) as server:
            done = fetch(server, small)
            assert done.returncode == 1 and "the disk is full: s2.zip" in done.stderr and "make room" in done.stderr, done.stderr
            assert len(done.stderr.splitlines()) == 1
            assert len(list((small / "grid" / "raw" / "s1").glob("*.mpg"))) == 3
            subprocess.run(["mount", "-o", "remount,size=8m", str(small)], check=True)
            before = len(server.requests)
            assert fetch(server, small).returncode == 0 and whole(small)
            assert "s1.zip" not in [n for n, _ in server.requests[before:]]
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_never_means_no_socket(tmp_path):
    "With AVLAB_DOWNLOADS=never a process in which every socket is an error still gives the one line."
    code = """
import socket, sys
def refuse(*a, **kw): raise SystemExit("a socket was opened")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from avlab.app.cli import main
main(sys.argv[1:])"""
    for more in ([], ["--base-url", "http://10.0.0.1/records/1"], ["--base-url", "https://localhost.example.org/records/1"]):
        command = [sys.executable, "-c", code, "grid", "download", "--speakers", "s1", "--dir", str(tmp_path / "data"), *more]
        done = subprocess.run(command, env={**os.environ, "AVLAB_DOWNLOADS": "never", "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1) and "no connection was opened" in done.stderr, done.stderr
    assert not list(tmp_path.iterdir())


def test_a_redirect_to_elsewhere_is_not_followed(tmp_path):
    class Away(Handler):
        def do_GET(self):
            self.send_response(302)
            self.send_header("Location", "http://10.255.255.1/x")
            self.send_header("Content-Length", "0")
            self.end_headers()

    with serving() as server:
        server.RequestHandlerClass = Away
        done = fetch(server, tmp_path, speakers=["s1"], timeout=30)
    assert done.returncode == 1 and "302" in done.stderr


def local_copy(folder, half=False):
    folder.mkdir()
    for name, body in corpus_zips().items():
        (folder / name).write_bytes(body[: len(body) // 2] if half and name == "s1.zip" else body)
    return folder


def test_a_local_copy_as_zips_and_as_folders(avlab, tmp_path):
    zips = local_copy(tmp_path / "zips")
    done = avlab("grid", "download", "--local-path", zips, "--dir", tmp_path / "a")
    assert (done.returncode, done.stderr) == (0, "") and whole(tmp_path / "a") and len(list(zips.iterdir())) == 3
    done = avlab("grid", "download", "--local-path", tmp_path / "a", "--speakers", "s2", "--dir", tmp_path / "b")
    assert done.returncode == 0 and whole(tmp_path / "b", ["s2"])
    assert "0 done, 2 were there" in avlab("grid", "download", "--local-path", tmp_path / "a", "--speakers", "s2", "--dir", tmp_path / "b").stdout


def test_half_a_zip(avlab, tmp_path):
    done = avlab("grid", "download", "--local-path", local_copy(tmp_path / "zips", half=True), "--dir", tmp_path / "a")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1) and "s1.zip is not a whole zip" in done.stderr
    assert len(list((tmp_path / "a" / "grid" / "raw" / "s2").glob("*.mpg"))) == 3


def test_ways_to_name_speakers(tmp_path):
    with serving() as server:
        ways = [["--speakers", "s1", "s2"], ["--speakers", "2,s1"], ["--speakers", "s1", "--speakers", "s2"]]
        plans = [run_avlab("grid", "download", *way, "--dir", tmp_path, "--base-url", server.url, "--dry-run", "--json").stdout for way in ways]
    assert len(set(plans)) == 1 and [f["name"] for f in json.loads(plans[0])["files"]] == ["alignments.zip", "s1.zip", "s2.zip"]
