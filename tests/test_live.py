"""The live protocol against many more strangers than a page has room for, and queues in real time."""
import asyncio, io, threading, time, tracemalloc
from collections import Counter
import numpy as np, psutil, pytest
from avlab.core import AvlabError, BadRequest
from avlab.live import Door, Kind, Limits, LiveQueue, ProtocolError, QueueClosed, control, hostile, jpeg_size, pack, unpack


def picture(width=48, height=32, **options):
    from PIL import Image
    b = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)).save(b, "JPEG", **options)
    return b.getvalue()


def test_twenty_thousand_hostile_messages():
    reasons, peak = Counter(), 0
    tracemalloc.start()
    for message in hostile(20_000, seed=11):
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        try:
            packet = unpack(message)
            if packet.kind == Kind.CONTROL: control(packet)
            reasons["taken"] += 1
        except BadRequest as e: reasons[e.reason] += 1
        peak = max(peak, tracemalloc.get_traced_memory()[1] - before)
    tracemalloc.stop()
    assert sum(reasons.values()) == 20_000 and len(reasons) >= 9
    assert peak < 16*Limits().control, f"{peak} bytes for one message"


def test_a_flood_does_not_grow_memory():
    door, me = Door(messages=(1e9, 1e9), bytes_=(1e12, 1e12)), psutil.Process()
    def flood(n, seed):
        for message in hostile(n, seed):
            try: door.admit(message)
            except ProtocolError: pass
    flood(3000, 0)
    before = me.memory_info().rss
    flood(20_000, 1)
    assert me.memory_info().rss - before < 5_000_000
    assert door.closing


def test_the_size_agrees_with_the_decoder():
    "Whatever is done to a JPEG: when its size is accepted, a decoder makes that size or nothing."
    import cv2
    rng, agreed, refused = np.random.default_rng(2), 0, 0
    goods = [picture(), picture(33, 65, quality=30, subsampling=0), picture(64, 64, optimize=True, exif=b"Exif\0\0" + bytes(40))]
    for _ in range(5000):
        m = bytearray(goods[rng.integers(3)])
        head = m.index(b"\xff\xda")
        for at in rng.integers(2, head + 12, int(rng.integers(1, 5))): m[at] = rng.integers(256)
        try: width, height = jpeg_size(m)
        except ProtocolError: refused += 1; continue
        if width*height > 4_000_000: refused += 1; continue
        seen = cv2.imdecode(np.frombuffer(m, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
        if seen is not None: assert seen.shape[:2] == (height, width); agreed += 1
    assert agreed > 300 and refused > 300


def test_every_prefix_and_every_flipped_byte():
    message = pack(Kind.VIDEO, picture(16, 16), sequence=9, capture_us=9)
    for cut in range(len(message)):
        with pytest.raises(ProtocolError): unpack(message[:cut])
    for at in range(len(message)):
        for value in (0, 255, message[at] ^ 1):
            try: unpack(message[:at] + bytes([value]) + message[at+1:])
            except ProtocolError: pass


def test_errors_survive_pickling():
    import pickle
    e = pickle.loads(pickle.dumps(ProtocolError("a", "b", "jpeg")))
    assert (e.found, e.do, e.reason, isinstance(e, AvlabError)) == ("a", "b", "jpeg", True)


def test_overload_in_real_time():
    "A thread that is ten times faster than its asyncio taker: depth one, fresh items, in order, and no busy waiting."
    q, seen = LiveQueue(), []
    def camera():
        for i in range(300): q.put((i, time.monotonic())); time.sleep(.005)
        q.close()
    async def engine():
        while True:
            try: i, born = await q.aget()
            except QueueClosed: return
            seen.append((i, time.monotonic() - born)); await asyncio.sleep(.05)
    cpu, begun = time.process_time(), time.monotonic()
    t = threading.Thread(target=camera); t.start(); asyncio.run(engine()); t.join()
    seconds = time.monotonic() - begun
    stats, ages = q.stats(), np.array([a for _, a in seen])
    assert stats.peak == 1 and stats.put == 300 and stats.dropped + stats.delivered == 300 and stats.delivered <= seconds/.05 + 2
    assert [i for i, _ in seen] == sorted(i for i, _ in seen)
    assert np.median(ages[len(ages)//2:]) < .2, "latency must not grow: behind an unbounded queue it would be seconds"
    assert time.process_time() - cpu < 1.0


def test_many_threads_and_tasks_share_one_queue():
    "Two threads and two tasks put, two of each take: every item arrives exactly once."
    q, got, lock = LiveQueue(5, "wait"), [], threading.Lock()
    def put(base): [q.put(base + i) for i in range(500)]
    def take():
        try:
            while True:
                x = q.get()
                with lock: got.append(x)
        except QueueClosed: pass
    async def aput(base): [await q.aput(base + i) for i in range(500)]
    async def atake():
        try:
            while True:
                x = await q.aget()
                with lock: got.append(x)
        except QueueClosed: pass
    async def main():
        takers = [asyncio.create_task(atake()) for _ in range(2)] + [asyncio.create_task(asyncio.to_thread(take)) for _ in range(2)]
        await asyncio.gather(aput(0), aput(1000), asyncio.to_thread(put, 2000), asyncio.to_thread(put, 3000))
        q.close()
        await asyncio.gather(*takers)
    asyncio.run(asyncio.wait_for(main(), 60))
    assert sorted(got) == sorted(b + i for b in (0, 1000, 2000, 3000) for i in range(500))


def test_a_loop_that_ended_does_not_disturb_the_queue():
    "A task that waited in a loop which is gone must not break the next put."
    q = LiveQueue()
    loop = asyncio.new_event_loop()
    task = loop.create_task(q.aget())
    loop.run_until_complete(asyncio.sleep(0))
    loop.call_soon(loop.stop); loop.run_forever()
    task._log_destroy_pending = False
    loop.close()
    q.put(1)
    assert q.get(timeout=1) == 1
