"""Kill submitters and workers with signal 9 at random moments, hundreds of times, and compare the ledger with the items' own journal.

    python tests/soak/soak_batch.py --kills 300 --items 400 --seed 0

Writes tests/soak/results/batch.json; exits 1 when anything was lost, redone, corrupted or left behind."""
import argparse, json, os, random, shutil, signal, sqlite3, subprocess, sys, tempfile, time
from contextlib import closing
from pathlib import Path
import psutil
from avlab.core import item_seed, to_json, write_atomic
from avlab.ledger import Ledger

JOB = Path(__file__).parents[1]/"batch_job.py"


def journal(home):
    path = home/"journal"
    return [l.split() for l in path.read_text().splitlines()] if path.exists() else []


def done_rows(home):
    "Done items as the ledger has them; raises when the file is not sound."
    if not (home/"ledger.db").exists(): return {}
    with closing(sqlite3.connect(home/"ledger.db")) as db: sound = db.execute("pragma integrity_check").fetchone()[0]
    if sound != "ok": raise sqlite3.DatabaseError(sound)
    return {r["key"]: r for r in Ledger(home/"ledger.db").rows() if r["state"] == "done"} if b"items" in (home/"ledger.db").read_bytes() else {}


def running(process):
    try: return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess: return False


class Round:
    "One ledger, from its first life to its last."
    def __init__(self, names, rng, totals, nap_s):
        self.names, self.rng, self.totals, self.nap_s = names, rng, totals, nap_s
        self.home, self.done, self.begun_at_done = Path(tempfile.mkdtemp(prefix="avlab-soak-")), {}, {}

    def start(self):
        return subprocess.Popen([sys.executable, str(JOB), str(self.home), ",".join(self.names), str(self.nap_s), "workers=2"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def pause(self, job, seconds):
        "True while the job still runs after `seconds`."
        try: job.wait(seconds)
        except subprocess.TimeoutExpired: return True

    def life(self, most):
        "One submitter, some of its workers killed, then itself."
        job, t, n = self.start(), self.totals, len(journal(self.home))
        while len(journal(self.home)) == n:
            if not self.pause(job, .05): break
        for _ in range(min(most - 1, self.rng.randrange(5))):
            if not self.pause(job, self.rng.uniform(.05, 1.2)): break
            begun = [int(p) for a, _, p in journal(self.home) if a == "begin"][-4:]
            alive = [p for p in set(begun) if psutil.pid_exists(p)]
            if not alive: continue
            try: os.kill(self.rng.choice(alive), signal.SIGKILL); t["worker_kills"] += 1
            except ProcessLookupError: pass
        if self.pause(job, self.rng.uniform(.02, 1.5)):
            family = psutil.Process(job.pid).children(recursive=True)
            job.kill(); t["submitter_kills"] += 1
            job.wait()
            self.bury(family)
        self.check()

    def bury(self, family, limit_s=60):
        "Workers end by themselves when their submitter is gone; one that is just being started first has to come to its senses."
        began = time.monotonic()
        while alive := [p for p in family if running(p)]:
            if time.monotonic() - began > limit_s: break
            time.sleep(.1)
        self.totals["slowest_exit_s"] = max(self.totals["slowest_exit_s"], round(time.monotonic() - began, 1))
        self.totals["leftover_processes"] += len(alive)
        for p in alive: print("left over:", p.cmdline(), file=sys.stderr); p.kill()

    def check(self):
        "What was done must stay done, and must never begin again."
        try: now = done_rows(self.home)
        except sqlite3.DatabaseError: self.totals["corrupt_ledgers"] += 1; return
        begun = {}
        for a, item, _ in journal(self.home): begun[item] = begun.get(item, 0) + (a == "begin")
        for key, row in self.done.items():
            if now.get(key, {}).get("finished") != row["finished"]: self.totals["lost_items"] += 1
            if begun[key] != self.begun_at_done[key]: self.totals["redone_after_done"] += 1
        for key in now.keys() - self.done.keys(): self.begun_at_done[key] = begun[key]
        self.done = now

    def finish(self):
        "Lives without kills until all is done, then the last account."
        t = self.totals
        for _ in range(3):
            if self.start().wait(600) == 0: break
        self.check()
        t["lost_items"] += len(set(self.names) - self.done.keys())
        t["wrong_outputs"] += sum(not (p := self.home/"out"/f"{i}.txt").exists() or p.read_text() != f"{i} {item_seed(7, i)}" for i in self.names)
        begins, ends = (sum(a == word for a, _, _ in journal(self.home)) for word in ("begin", "end"))
        t["items"] += len(self.names); t["rounds"] += 1
        t["begun"] += begins; t["cut_off"] += begins - ends; t["ended_but_not_recorded"] += ends - len(self.names)
        t["attempts_in_ledger"] += sum(r["attempts"] for r in Ledger(self.home/"ledger.db").rows())
        shutil.rmtree(self.home)


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--kills", type=int, default=300, help="submitters and workers together")
    p.add_argument("--items", type=int, default=400, help="a ledger")
    p.add_argument("--nap-s", type=float, default=.15, help="how long an item takes")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, default=Path(__file__).parent/"results"/"batch.json")
    a = p.parse_args()
    os.nice(10)
    names = ("items rounds submitter_kills worker_kills begun cut_off ended_but_not_recorded attempts_in_ledger "
        "lost_items redone_after_done wrong_outputs corrupt_ledgers leftover_processes slowest_exit_s")
    totals, rng, began = dict.fromkeys(names.split(), 0), random.Random(a.seed), time.monotonic()
    kills = lambda: totals["submitter_kills"] + totals["worker_kills"]
    while kills() < a.kills:
        r = Round([f"clip{totals['rounds']:02d}_{i:04d}" for i in range(a.items)], rng, totals, a.nap_s)
        while kills() < a.kills and len(r.done) < a.items: r.life(a.kills - kills())
        r.finish()
    totals |= dict(seed=a.seed, minutes=round((time.monotonic() - began)/60, 1))
    write_atomic(a.out, json.dumps(to_json(totals), indent=1) + "\n")
    print(json.dumps(totals))
    return int(any(totals[k] for k in ("lost_items", "redone_after_done", "wrong_outputs", "corrupt_ledgers", "leftover_processes")))


if __name__ == "__main__": sys.exit(main())
