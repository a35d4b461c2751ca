"""A hundred thousand nearly right messages into a live session, twenty thousand of them written by hypothesis, and twenty thousand more over a real socket.

    python tests/soak/soak_serve.py --messages 100000 --seed 0

After each round a proper picture must still come back. Writes tests/soak/results/serve.json; exits 1 on any error that is not a refusal, on a message that
takes too long, on a thread that stays, or on memory that grows."""
import argparse, asyncio, json, os, sys, time
from pathlib import Path
import psutil
sys.path.insert(0, str(Path(__file__).parents[1]))
from serve_messages import JPEG, nearly_right, written
from avlab.core import to_json, write_atomic
from avlab.protocol import Door, Kind, pack
from avlab.swap.client import ask_ticket
from avlab.swap.house import ServeOptions
from avlab.swap.server import Background
from avlab.swap.session import Session
from avlab.swap.tickets import PROTOCOL, Rates

WIDE = (1e9, 1e9)


class Mirror:
    "Stands in for the pipeline."
    def __init__(self, *_): pass
    def process(self, frame): return frame[:, ::-1], None
    def set_source(self, source): pass
    def reset(self): pass
    def close(self): pass


def memory(): return psutil.Process().memory_info().rss/1e6


def given(session, message, count):
    begun = time.thread_time()
    try: session.receive(message)
    except Exception as e: count["other_errors"] += 1; count["error"] = repr(e)
    took = time.thread_time() - begun
    count["messages"] += 1; count["slowest_ms"] = max(count["slowest_ms"], 1e3*took); count["hangs"] += took > .1
    while session.out.take(): pass


def still_works(session, count):
    time.sleep(.1)
    session.receive(pack(Kind.CONTROL, dict(type="settings", swap=True, fps=60), sequence=0, capture_us=0))
    end = time.monotonic() + 5
    while time.monotonic() < end:
        session.receive(pack(Kind.VIDEO, JPEG, sequence=77, capture_us=2**62)); time.sleep(.05)
        while (item := session.out.take()):
            if item.kind == Kind.VIDEO and item.sequence == 77: return
    count["silent"] += 1; count["error"] = session.error or session.closing


def a_round(messages, count):
    with Session(Mirror, door=Door(messages=WIDE, bytes_=(1e12, 1e12)), resolve=lambda name: name) as s:
        if callable(messages): messages(lambda m: given(s, m, count))
        else:
            for m in messages: given(s, m, count)
        still_works(s, count)
    count["threads_left"] += sum(t.is_alive() for t in s._threads)


def by_hypothesis(n, seed):
    import hypothesis
    def run(give):
        @hypothesis.seed(seed)
        @hypothesis.settings(max_examples=n, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck))
        @hypothesis.given(written())
        def fuzz(m): give(m)
        fuzz()
    return run


async def over_a_socket(n, seed, count):
    "Visitors who send rubbish until they are thrown out, and come again."
    import websockets
    rates = Rates(tickets="1000000/minute", connections="1000000/minute", sessions=8, messages=WIDE, bytes_=(1e12, 1e12))
    server = Background(ServeOptions(port=0, pipeline=Mirror, rates=rates, messages=WIDE, bytes_=(1e12, 1e12)))
    with server as address:
        messages, sent = nearly_right(n, seed), 0
        while sent < n:
            live = websockets.connect(address.replace("http", "ws") + "/live", subprotocols=[PROTOCOL, f"ticket.{await asyncio.to_thread(ask_ticket, address)}"], compression=None, proxy=None, max_size=1 << 22)
            async with await live as ws:
                count["visits"] += 1
                reader = asyncio.ensure_future(drain(ws))
                try:
                    while sent < n:
                        sent += 1; count["over_the_socket"] += 1
                        await ws.send(next(messages))
                        if sent % 20 == 0: await asyncio.sleep(.004)
                except websockets.ConnectionClosed as e: count["thrown_out"] += 1; count["odd_endings"] += e.rcvd is not None and e.rcvd.code not in (1008, 1009)
                reader.cancel()
        await asyncio.sleep(.5)
        end = time.monotonic() + 10
        while server.house.sessions and time.monotonic() < end: await asyncio.sleep(.1)
        count["sessions_left"] = len(server.house.sessions) + server.house.addresses.sessions


async def drain(ws):
    async for _ in ws: pass


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--messages", type=int, default=100_000); p.add_argument("--written", type=int, default=20_000); p.add_argument("--socket", type=int, default=20_000)
    p.add_argument("--seed", type=int, default=0); p.add_argument("--out", type=Path, default=Path(__file__).parent/"results"/"serve.json")
    a = p.parse_args()
    count = dict.fromkeys(("messages", "other_errors", "hangs", "silent", "threads_left", "visits", "over_the_socket", "thrown_out", "odd_endings", "sessions_left"), 0) | dict(slowest_ms=0., error="")
    os.nice(10)
    begun, quiet = time.perf_counter(), os.dup(2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2) # libjpeg writes a line for every broken picture
    try:
        a_round(by_hypothesis(min(500, a.written), a.seed), count); a_round(nearly_right(3000, a.seed), count)
        first = memory()
        rest = max(0, a.messages - a.written - count["messages"])
        rounds = max(1, rest//10_000)
        for i in range(rounds): a_round(nearly_right(-(-rest//rounds), a.seed + 1 + i), count)
        grown_mb = memory() - first
        for i in range(max(1, a.written//5000)): a_round(by_hypothesis(min(5000, a.written), a.seed + 100 + i), count)
        asyncio.run(over_a_socket(a.socket, a.seed + 7, count))
    finally: os.dup2(quiet, 2)
    bad = {k: count[k] for k in ("other_errors", "hangs", "silent", "threads_left", "odd_endings", "sessions_left") if count[k]} | ({"grown_mb": grown_mb} if grown_mb > 20 else {})
    report = dict(seed=a.seed, written_by_hypothesis=a.written, **count, grown_mb=grown_mb, seconds=time.perf_counter() - begun, ok=not bad)
    write_atomic(a.out, json.dumps(to_json(report), indent=1) + "\n")
    print(f"{count['messages']} messages and {count['over_the_socket']} over a socket in {report['seconds']:.0f} s: {'no crash, no hang' if not bad else bad}, {grown_mb:+.1f} MB, slowest {count['slowest_ms']:.1f} ms")
    return bool(bad)


if __name__ == "__main__": sys.exit(main())
