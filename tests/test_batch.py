"""Batches in real processes that are really killed. What needs no kill is tested in nbs/09_*.ipynb."""
import json, os, signal, subprocess, sys, time
from collections import Counter
from pathlib import Path
import psutil, pytest
from avlab.core import BadRequest, item_seed
from avlab.ledger import Ledger, writing

JOB = Path(__file__).with_name("batch_job.py")
NAMES = [f"clip{i:02d}" for i in range(24)]


def start(home, items=NAMES, nap_s=.1, *options, **kw):
    return subprocess.Popen([sys.executable, str(JOB), str(home), ",".join(items), str(nap_s), *options], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, **kw)


def finish(home, *args, **kw):
    job = start(home, *args, **kw)
    out, err = job.communicate(timeout=120)
    return job.returncode, out, err


def journal(home):
    "Lines as (begin or end, item, pid); a kill can't cut a line, since each is one append."
    path = home/"journal"
    return [(a, b, int(c)) for a, b, c in (l.split() for l in path.read_text().splitlines())] if path.exists() else []


def begun(home): return Counter(b for a, b, _ in journal(home) if a == "begin")
def states(home, name="ledger.db"): return {r["key"]: r["state"] for r in Ledger(home/name).rows()}
def attempts(home): return {r["key"]: r["attempts"] for r in Ledger(home/"ledger.db").rows()}
def done(home): return {k for k, s in states(home).items() if s == "done"}


def until(true, what, limit_s=60):
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        if found := true(): return found
        time.sleep(.02)
    raise AssertionError(f"{what}: not within {limit_s} s")


def family(job): return [psutil.Process(job.pid), *psutil.Process(job.pid).children(recursive=True)]


def all_gone(processes, limit_s=60):
    alive = psutil.wait_procs(processes, timeout=limit_s)[1]
    return [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE] == []


def right_outputs(home, items=NAMES): return all((home/"out"/f"{i}.txt").read_text() == f"{i} {item_seed(7, i)}" for i in items)


def test_a_killed_submitter_leaves_work_that_resumes(tmp_path):
    job = start(tmp_path)
    until(lambda: (tmp_path/"ledger.db").exists() and len(begun(tmp_path)) > 0 and len(done(tmp_path)) >= 5, "five items done")
    with pytest.raises(BadRequest, match="being written by another batch"), writing(tmp_path/"ledger.db"): pass
    processes = family(job)
    os.kill(job.pid, signal.SIGKILL); job.wait()
    assert all_gone(processes), "workers outlived their submitter"
    kept, seen = done(tmp_path), set(begun(tmp_path))
    assert 5 <= len(kept) < len(NAMES)
    code, out, err = finish(tmp_path)
    assert (code, err) == (0, "") and json.loads(out)["done"] == len(NAMES)
    assert begun(tmp_path) == {i: 2 if i in seen - kept else 1 for i in NAMES}, "only the unfinished is redone"
    assert right_outputs(tmp_path)
    code, _, _ = finish(tmp_path)
    assert code == 0 and sum(begun(tmp_path).values()) == len(NAMES) + len(seen - kept), "a finished batch is not done again"


def test_a_killed_worker_costs_one_more_attempt(tmp_path):
    items = NAMES[:6]
    job = start(tmp_path, items, 1.0, "workers=2")
    _, item, pid = until(lambda: journal(tmp_path), "an item begun")[0]
    time.sleep(.3)
    os.kill(pid, signal.SIGKILL)
    cut = {b for a, b, p in journal(tmp_path) if p == pid and a == "begin"} - {b for a, b, p in journal(tmp_path) if p == pid and a == "end"}
    out, err = job.communicate(timeout=120)
    assert (job.returncode, err) == (0, "")
    expected = {i: 2 if i in cut else 1 for i in items}
    assert cut <= {item} and begun(tmp_path) == expected and attempts(tmp_path) == expected
    assert right_outputs(tmp_path, items)


def test_an_item_that_kills_its_workers_fails_alone(tmp_path):
    items = ["clip00", "poison", "clip01", "clip02"]
    code, out, err = finish(tmp_path, items, .05, "workers=2")
    assert code == 1 and states(tmp_path) == {**dict.fromkeys(items, "done"), "poison": "failed"}
    row = next(r for r in Ledger(tmp_path/"ledger.db").rows() if r["key"] == "poison")
    assert row["kind"] == "WorkerDied" and "four workers" in row["error"]
    assert begun(tmp_path)["poison"] == 4
    assert err == "", "the logs are quiet"


@pytest.mark.parametrize("whole_group", [False, True], ids=["submitter", "terminal"])
def test_an_interrupt_leaves_a_resumable_ledger(tmp_path, whole_group):
    job = start(tmp_path, nap_s=.3, start_new_session=True)
    until(lambda: len(begun(tmp_path)) >= 3, "three items begun")
    processes = family(job)
    (os.killpg if whole_group else os.kill)(job.pid, signal.SIGINT)
    job.communicate(timeout=30)
    assert job.returncode != 0 and all_gone(processes)
    assert set(states(tmp_path).values()) <= {"done", "waiting"} and 0 < len(done(tmp_path) | {"-"}) < len(NAMES)
    kept = done(tmp_path)
    assert finish(tmp_path, NAMES, .01)[0] == 0
    assert all(begun(tmp_path)[i] == 1 for i in kept) and right_outputs(tmp_path)


@pytest.fixture
def scheduler(tmp_path):
    "A scheduler and two workers as a cluster of machines would run them."
    where, dask = tmp_path/"scheduler.json", [sys.executable, "-m", "dask"]
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=tmp_path)
    boss = subprocess.Popen([*dask, "scheduler", "--port", "0", "--host", "127.0.0.1", "--no-dashboard", "--scheduler-file", str(where)], **quiet)
    hands = subprocess.Popen([*dask, "worker", "--nworkers", "2", "--nthreads", "1", "--no-dashboard", "--scheduler-file", str(where)], **quiet)
    processes = []
    try:
        until(lambda: where.exists() and where.stat().st_size, "a scheduler")
        yield boss, json.loads(where.read_text())["address"]
    finally:
        for p in (hands, boss):
            if p.poll() is None: processes += family(p)
        for p in processes:
            try: p.kill()
            except psutil.NoSuchProcess: pass
        for p in (hands, boss): p.wait()


def test_a_cluster_by_its_address_also_when_it_goes_away(tmp_path, scheduler):
    boss, address = scheduler
    assert finish(tmp_path, NAMES[:6], .05, f"client={address}")[0] == 0
    job = start(tmp_path, NAMES, .5, f"client={address}")
    until(lambda: len(begun(tmp_path)) >= 8, "the next items begun")
    boss.kill()
    _, err = job.communicate(timeout=60)
    assert job.returncode == 2 and "the Dask scheduler went away" in err.splitlines()[-1]
    assert set(states(tmp_path).values()) <= {"done", "waiting"}
    kept = done(tmp_path)
    assert finish(tmp_path, NAMES, .01)[0] == 0
    assert all(begun(tmp_path)[i] == 1 for i in kept)


def test_nobody_at_an_address(tmp_path):
    code, _, err = finish(tmp_path, NAMES[:2], .01, "client=tcp://127.0.0.1:1")
    assert code == 2 and len(err.splitlines()) == 1 and "no Dask scheduler answers at tcp://127.0.0.1:1" in err
    assert set(states(tmp_path).values()) == {"waiting"}


def test_a_script_without_the_guard_is_told(tmp_path):
    script = tmp_path/"bare.py"
    script.write_text(f"from avlab.batch import map\nmap(abs, [1, 2], key=str, ledger={str(tmp_path/'l.db')!r})\n")
    told = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert told.returncode == 1 and told.stderr.splitlines()[-1].endswith("A script starts a batch under `if __name__ == '__main__':`.")
    assert states(tmp_path, "l.db") == {"1": "waiting", "2": "waiting"}


NAPPING = """
import sys; from avlab.batch import sweep
if __name__ == "__main__": sweep(sys.argv[1], {"nap_s": [60.0, 61.0]}, out=sys.argv[2], workers=2, show=False)
"""

def notebook(path, *cells):
    path.write_text(json.dumps(dict(nbformat=4, nbformat_minor=5, metadata={},
        cells=[dict(id=f"c{i}", cell_type="code", execution_count=None, outputs=[],
        metadata={"tags": ["parameters"]} if i == 0 else {}, source=c) for i, c in enumerate(cells)])))
    return path


def test_kernels_end_with_their_sweep(tmp_path):
    nb = notebook(tmp_path/"nap.ipynb", "nap_s = 0.1\nout = ''", "import time, pathlib; (pathlib.Path(out)/'asleep').touch(); time.sleep(nap_s)")
    script = tmp_path/"sweep_job.py"; script.write_text(NAPPING)
    job = subprocess.Popen([sys.executable, str(script), str(nb), str(tmp_path/"out")])
    until(lambda: len(list((tmp_path/"out").rglob("asleep"))) == 2, "two kernels at work")
    processes = family(job)
    assert sum("ipykernel" in " ".join(p.cmdline()) for p in processes) >= 2
    os.kill(job.pid, signal.SIGKILL); job.wait()
    assert all_gone(processes), "kernels outlived their sweep"


def test_a_kernel_that_dies_is_one_line(tmp_path):
    from avlab.runs import NotebookFailed, run
    nb = notebook(tmp_path/"crash.ipynb", "out = ''", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(NotebookFailed, match=r"crash.ipynb, cell 2 \(import os, signal\): the kernel died"): run(nb, {}, tmp_path/"out", show=False)
    assert [p.name for p in (tmp_path/"out").iterdir()] == ["crash.failed.ipynb"]
