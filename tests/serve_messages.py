"Messages for a live server that are nearly right: written by hypothesis, or by a seeded generator that is a hundred times faster."
import json

import numpy as np
from avlab.protocol import HEADER, hostile
from avlab.swap.session import encode_jpeg

KINDS = ["hello", "settings", "swap", "ping", "shown", "reset", "stats", "source"]
NAMES = ["type", "on", "side", "fps", "voice", "source", "t", "sequence", "timbre", "pitch_semitones", "formant", "acks", "swap", "?"]
VALUES = [None, True, False, 0, 1, -1, 2.5, 1e300, 4294967295, 4294967296, 256, 512, "", "collins", "hopper", "upload-x", "é" * 40, "a\n", [], [1], {}, {"a": []}]
JPEG = encode_jpeg(np.random.default_rng(0).integers(0, 255, (32, 48, 3), dtype=np.uint8))


def written():
    "A hypothesis strategy for messages."
    from hypothesis import strategies as st

    words = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=9))
    wishes = st.dictionaries(st.sampled_from(NAMES), st.one_of(words, st.lists(words, max_size=3), st.sampled_from(KINDS)), max_size=5)
    changed = st.tuples(st.integers(0, len(JPEG) - 1), st.integers(0, 255)).map(lambda c: JPEG[: c[0]] + bytes([c[1]]) + JPEG[c[0] + 1 :])
    payloads = st.one_of(st.binary(max_size=200), wishes.map(lambda w: json.dumps(w).encode()), changed)
    framed = st.tuples(st.sampled_from([1, 2, 3, 4]), payloads, st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1))
    return st.one_of(st.binary(max_size=60), framed.map(lambda t: HEADER.pack(b"AV", 1, t[0], t[2], t[3], len(t[1])) + t[1]))


def nearly_right(n, seed):
    "Endless variety, same seed, same messages: a third from `hostile`, a third wishes, a third pictures and sound."
    rng = np.random.default_rng(seed)
    pick = lambda options: options[int(rng.integers(len(options)))]
    frame = lambda kind, body: HEADER.pack(b"AV", 1, kind, int(rng.integers(2**32)), int(rng.integers(2**63)), len(body)) + body
    for i, m in enumerate(hostile(n, seed)):
        if i % 3 == 0:
            yield m
        elif i % 3 == 1:
            wish = {pick(NAMES): pick(VALUES) for _ in range(int(rng.integers(0, 5)))} | {"type": pick(KINDS)}
            yield frame(3, json.dumps(wish, ensure_ascii=bool(rng.integers(2))).encode())
        elif rng.random() < 0.5:
            body = bytearray(JPEG)
            for at in rng.integers(2, len(body), int(rng.integers(0, 4))):
                body[at] = rng.integers(256)
            yield frame(1, bytes(body))
        else:
            yield frame(2, rng.bytes(int(rng.integers(1, 900))))
