"What several tests need: the command line in fresh processes, and small real material."
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "transformers", "mediapipe", "cv2", "librosa", "av", "matplotlib", "pandas", "tensorflow", "jax", "onnxruntime")


def run_avlab(*args, cwd=None, timeout=180, env=None, **kw):
    "`avlab` in a fresh process: .returncode, .stdout, .stderr."
    command = [sys.executable, "-m", "avlab.app.cli", *map(str, args)]
    full = {**os.environ, "AVLAB_DOWNLOADS": "never", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **(env or {})}
    return subprocess.run(command, cwd=cwd, env=full, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL, **kw)


@pytest.fixture
def avlab():
    return run_avlab


@pytest.fixture(scope="session")
def material(tmp_path_factory):
    "A folder with a portrait, a clip of a talking face with sound, and a sound."
    from PIL import Image
    from skimage.data import astronaut

    folder = tmp_path_factory.mktemp("material")
    Image.fromarray(astronaut()).save(folder / "portrait.jpg", quality=92)
    done = run_avlab("talk", folder / "portrait.jpg", "bin blue at f two now", "-o", folder / "clip.mp4", "--seed", 3)
    assert done.returncode == 0, done.stderr
    from avlab.encode import write_audio, write_video
    from avlab.media import read_audio

    write_audio(folder / "said.wav", read_audio(folder / "clip.mp4"), 16000)
    write_video(folder / "noface.mp4", (np.full((96, 96, 3), 9 * i, np.uint8) for i in range(10)), 25)
    return folder


def pytest_configure(config):
    os.environ.setdefault("AVLAB_DOWNLOADS", "never")
    os.environ.setdefault("MPLBACKEND", "agg")
