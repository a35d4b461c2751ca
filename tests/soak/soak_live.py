"""A hundred thousand hostile messages through the door and a queue, from a thread to an asyncio task.

    python tests/soak/soak_live.py --messages 100000 --seed 0

Every picture that gets in is decoded, and its size compared with what the door read. Writes tests/soak/results/live.json; exits 1 on anything but
a `ProtocolError`, on a message that takes too long, on a size that disagrees, or on memory that grows."""
import argparse, asyncio, io, json, os, sys, threading, time
from collections import Counter
from pathlib import Path
import numpy as np, psutil
from avlab.core import to_json, write_atomic
from avlab.live import Door, Kind, LiveQueue, ProtocolError, QueueClosed, hostile, pack, samples


def pictures(rng):
    "Endless real JPEGs, every second one with bytes changed."
    from PIL import Image
    goods = []
    for size in ((48, 32), (33, 65), (128, 96)):
        b = io.BytesIO(); Image.fromarray(rng.integers(0, 255, (*size[::-1], 3), dtype=np.uint8)).save(b, "JPEG", quality=40)
        goods.append(b.getvalue())
    while True:
        m = bytearray(goods[rng.integers(3)])
        if rng.random() < .5:
            for at in rng.integers(2, 640, int(rng.integers(1, 6))): m[at] = rng.integers(256)
        yield pack(Kind.VIDEO, bytes(m), sequence=int(rng.integers(2**32)), capture_us=int(rng.integers(2**63)))


def stream(n, seed):
    "Hostile messages, every tenth one a picture."
    real = pictures(np.random.default_rng(seed))
    for i, m in enumerate(hostile(n, seed)): yield next(real) if i % 10 == 0 else m


def send(messages, q, door, count, reasons):
    for m in messages:
        begun = time.thread_time()
        try: packet = door.admit(m)
        except ProtocolError as e: reasons[e.reason] += 1; packet = None
        except Exception as e: count["other_errors"] += 1; reasons[type(e).__name__] += 1; packet = None
        took = time.thread_time() - begun
        count["slowest_ms"] = max(count["slowest_ms"], took*1e3); count["hangs"] += took > .1
        if packet is not None: reasons["taken"] += 1; q.put(packet)
    q.close()


async def take(q, count):
    import cv2
    while True:
        try: p = await q.aget()
        except QueueClosed: return
        count["through_the_queue"] += 1
        if p.kind == Kind.AUDIO: samples(p)
        if p.kind == Kind.VIDEO and p.width*p.height <= 4_000_000:
            seen = cv2.imdecode(np.frombuffer(p.payload, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
            if seen is not None: count["pictures_decoded"] += 1; count["sizes_disagree"] += seen.shape[:2] != (p.height, p.width)


def run(n, seed, count, reasons):
    q, door = LiveQueue(64, "wait"), Door(messages=(1e9, 1e9), bytes_=(1e12, 1e12))
    t = threading.Thread(target=send, args=(stream(n, seed), q, door, count, reasons)); t.start()
    asyncio.run(take(q, count)); t.join()
    count["queue_peak"] = max(count["queue_peak"], q.stats().peak); count["sessions_that_would_close"] += door.closing


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--messages", type=int, default=100_000)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, default=Path(__file__).parent/"results"/"live.json")
    a = p.parse_args()
    os.nice(10)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2) # the decoder complains about every broken picture
    import cv2
    cv2.setNumThreads(1)
    names = "other_errors hangs sizes_disagree through_the_queue pictures_decoded sessions_that_would_close queue_peak slowest_ms".split()
    fresh = lambda: Counter(dict.fromkeys(names, 0))
    run(5000, a.seed + 1000, fresh(), Counter())
    me, count, reasons, began = psutil.Process(), fresh(), Counter(), time.monotonic()
    before, part = me.memory_info().rss, 10_000
    for i in range(0, a.messages, part): run(min(part, a.messages - i), a.seed + i//part, count, reasons)
    grown = (me.memory_info().rss - before)/1e6
    result = dict(messages=sum(reasons.values()), **count, memory_growth_mb=round(grown, 2), seconds=round(time.monotonic() - began, 1), seed=a.seed,
        outcomes=dict(reasons.most_common()))
    result["slowest_ms"] = round(result["slowest_ms"], 2)
    write_atomic(a.out, json.dumps(to_json(result), indent=1) + "\n")
    print(json.dumps(result))
    return int(bool(count["other_errors"] or count["hangs"] or count["sizes_disagree"] or grown > 10 or result["messages"] != a.messages))


if __name__ == "__main__": sys.exit(main())
