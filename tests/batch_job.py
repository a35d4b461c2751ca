"""A batch that keeps a journal of its own: python batch_job.py HOME ITEMS NAP_S [KEY=VALUE …]

Every item writes `begin item pid` and `end item pid` with one append each, so that the journal and the ledger can be compared after any kill.
An item named `poison` kills its worker. `client=tcp://…` uses that scheduler, `workers=N` processes of its own."""
import json, os, signal, sys, time
from functools import partial
from pathlib import Path


def note(home, *words):
    f = os.open(Path(home)/"journal", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(f, (" ".join(str(w) for w in words) + "\n").encode())
    os.close(f)


def work(item, seed, home, nap_s):
    note(home, "begin", item, os.getpid())
    time.sleep(nap_s)
    if item == "poison": os.kill(os.getpid(), signal.SIGKILL)
    out = Path(home)/"out"/f"{item}.txt"
    out.write_text(f"{item} {seed}")
    note(home, "end", item, os.getpid())
    return out, {"seed": seed}


def main(home, items, nap_s, *options):
    from avlab.batch import map
    from avlab.core import AvlabError
    (Path(home)/"out").mkdir(exist_ok=True)
    options = dict(o.split("=", 1) for o in options)
    if "workers" in options: options["workers"] = int(options["workers"])
    try:
        ledger = map(partial(work, home=home, nap_s=float(nap_s)), items.split(","), key=str, ledger=Path(home)/"ledger.db", seed=7, show=False,
            **options)
    except AvlabError as e:
        print(f"{type(e).__name__}: {e}", file=sys.stderr)
        return 2
    print(json.dumps(ledger.counts()))
    return 0 if ledger.ok else 1


if __name__ == "__main__": sys.exit(main(*sys.argv[1:]))
