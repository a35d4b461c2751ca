"""An hour of film, written and read again as streams: a flash and a click every ten seconds, their distance, and the memory it took.

    python tests/soak/soak_media.py --minutes 60

Writes tests/soak/results/media.json; exits 1 when a flash or click is missing, more than 1 ms apart, or when memory grows with length."""
import argparse, json, os, sys, tempfile, time
from pathlib import Path
import numpy as np, psutil
from avlab.core import to_json, write_atomic
from avlab.media import probe, read_audio_blocks, read_frames, write_video

FPS, RATE, SIZE, EVERY_S = 25, 16000, (96, 128), 10
MEMORY = []


def remember(i, every):
    if i % every == 0: MEMORY.append(psutil.Process().memory_info().rss/1e6)


def film(minutes):
    "Dark frames, a white one every ten seconds."
    dark, white = (np.full((*SIZE, 3), v, np.uint8) for v in (24, 255))
    for i in range(minutes*60*FPS):
        remember(i, 60*FPS)
        yield white if i % (EVERY_S*FPS) == 0 else dark


def sound(minutes):
    "Silence, one second at a time, and a click where the picture flashes."
    click = np.zeros(RATE, np.float32); click[:32] = .9*np.hanning(64)[32:]
    for s in range(minutes*60): yield click if s % EVERY_S == 0 else np.zeros(RATE, np.float32)


def flashes(path):
    for i, f in enumerate(read_frames(path)):
        remember(i, 60*FPS)
        if f[::8, ::8].mean() > 140: yield i/FPS


def clicks(path):
    at, last = 0, -1e9
    for block in read_audio_blocks(path, sample_rate=RATE):
        loud = np.flatnonzero(np.abs(block) > .3)
        if len(loud) and (t := (at + loud[0])/RATE) - last > 1: last = t; yield t
        at += len(block)


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--minutes", type=int, default=60); p.add_argument("--out", type=Path, default=Path(__file__).parent/"results"/"media.json")
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as d:
        t = time.perf_counter(); path = write_video(Path(d)/"hour.mp4", film(a.minutes), FPS, audio=sound(a.minutes), sample_rate=RATE)
        wrote_s, written, info = time.perf_counter() - t, MEMORY[:], probe(path)
        MEMORY.clear(); t = time.perf_counter()
        seen, heard = np.array(list(flashes(path))), np.array(list(clicks(path)))
        read_s = time.perf_counter() - t
    want = np.arange(0, a.minutes*60, EVERY_S)
    paired = len(seen) == len(heard) == len(want)
    offset_ms = 1e3*(heard - seen) if paired else np.array([np.inf])
    grown = {k: max(m) - m[min(3, len(m) - 1)] for k, m in (("writing", written), ("reading", MEMORY))}
    result = dict(minutes=a.minutes, frames=info.frames, flashes=len(seen), clicks=len(heard), expected=len(want), worst_offset_ms=np.abs(offset_ms).max(),
        drift_ms=abs(offset_ms[-10:].mean() - offset_ms[:10].mean()), grown_mb=grown, write_s=wrote_s, read_s=read_s, cores=len(os.sched_getaffinity(0)))
    write_atomic(a.out, json.dumps(to_json(result), indent=1) + "\n")
    print(json.dumps(to_json(result)))
    return int(not paired or result["worst_offset_ms"] > 1 or max(grown.values()) > 30)


if __name__ == "__main__": sys.exit(main())
