"The heavy swap engines in fresh processes: contract models in place of weights, processors that do not start, packages that are absent, no network; and real weights where a machine has them."
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from conftest import HEAVY, ROOT

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

NO_NETWORK = """
import sys
def refuse(event, args):
    if event in ("socket.connect", "socket.getaddrinfo"): raise RuntimeError(f"{event} {args} must not happen")
sys.addaudithook(refuse)
import json, os
"""

START = """
import numpy as np
from avlab.core import AvlabError
from avlab.facemesh import face_of
from avlab.portrait import free_portrait
from avlab.swap.engines import ENGINES, ENHANCERS
from avlab.swap.source import prepare_source
target = np.ascontiguousarray(free_portrait("collins")[:320, 60:380])
mesh = face_of(target)
"""


def fresh(script, *args, site=None, **env):
    "The last line that a new interpreter prints, as JSON."
    path = os.pathsep.join(map(str, [ROOT, *([site] if site else [])]))
    full = {**os.environ, "OMP_NUM_THREADS": "1", "AVLAB_DOWNLOADS": "never", "PYTHONPATH": path, **{k: str(v) for k, v in env.items()}}
    full.pop("MODELS_DIR", None)
    done = subprocess.run([sys.executable, *(["-S"] if site else []), "-c", NO_NETWORK + script, *map(str, args)], capture_output=True, text=True, env=full, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    from avlab.swap.tiny_onnx import tiny_models

    return tiny_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def tiny(models, tmp_path):
    "The settings that put contract models in the weights' place."
    return dict(AVLAB_MODELS=models, AVLAB_CACHE=tmp_path, AVLAB_DEVICE="cpu")


@pytest.fixture
def none(tmp_path):
    "The settings of a machine without any weights."
    return dict(AVLAB_MODELS=tmp_path / "models", AVLAB_CACHE=tmp_path / "cache", AVLAB_DEVICE="cpu")


def test_importing_the_engines_is_light():
    modules = ("providers", "paste", "tiny_onnx", "arcface", "inswapper", "codeformer")
    loaded = fresh(f"import {', '.join(f'avlab.swap.{m}' for m in modules)}\nprint(json.dumps(sorted(sys.modules)))")
    assert not {"insightface", "onnx", *HEAVY} & set(loaded)


def test_contract_suite_through_the_registries(tiny):
    found = fresh(START + """
from avlab.swap.inswapper import contract_engine
from avlab.swap.tiny_onnx import contract_embedder, contract_restorer, contract_swapper
engine, enhancer = ENGINES.pick("inswapper").engine, ENHANCERS.pick("codeformer").engine
sources = tuple(prepare_source(n, embed=engine.embed) for n in ("hopper", "collins"))
work, clear = engine.open(sources[0]), enhancer.open(.4)
out = target.copy(); box = work(out, mesh); clear(out, mesh)
print(json.dumps(dict(
    broken=[contract_embedder(engine.embed.of_crop), contract_swapper(lambda c, e: work.net(c, work.net.emap.source_vector(e))),
        contract_restorer(clear.net), contract_engine(engine, sources, target, mesh)],
    auto=ENGINES.pick().name, provider=work.net.provider, contract=work.net.contract, box=box, changed=bool((out != target).any()))))
""", **tiny)
    assert found["broken"] == [[]] * 4
    assert (found["auto"], found["provider"], found["contract"], found["changed"]) == ("inswapper", "cpu", True, True)


@pytest.mark.parametrize("half", [False, True])
def test_whole_frame_like_insightface(models, tiny, half):
    pytest.importorskip("insightface")
    file = models / f"inswapper_128{'_fp16' if half else ''}.onnx"
    db = fresh(START + """
import contextlib, io, onnxruntime, warnings
warnings.simplefilter("ignore"); onnxruntime.set_default_logger_severity(3)
from insightface.app.common import Face
from insightface.model_zoo.inswapper import INSwapper
from avlab.swap.arcface import crop_matrix
from avlab.swap.inswapper import Inswapper
from avlab.swap.paste import reference_paste_back
engine = Inswapper(sys.argv[1]); source = prepare_source("hopper", embed=engine.embed)
out = target.copy(); engine.open(source)(out, mesh)
with contextlib.redirect_stdout(io.StringIO()): theirs = INSwapper(sys.argv[1])
ref = theirs.get(np.ascontiguousarray(target[..., ::-1]), Face(kps=np.float32(mesh.five)), Face(embedding=source.embedding))[..., ::-1]
inside = reference_paste_back(target, np.zeros((128, 128, 3), np.uint8), crop_matrix(mesh, 128))[1] > .004
print(json.dumps(float(10*np.log10(255**2/np.mean((out[inside].astype(float) - ref[inside])**2)))))
""", file, **tiny)
    assert db >= 40


MUTATIONS = {
    "emap from the other side": "inswapper.Emap.source_vector = lambda self, e: (v := np.float32(e)[None] @ self.matrix.T)/np.linalg.norm(v)",
    "source vector not normalised": "inswapper.Emap.source_vector = lambda self, e: np.float32(e)[None] @ self.matrix",
    "target as BGR": "call = inswapper.InswapperNet.__call__; inswapper.InswapperNet.__call__ = lambda self, c, s: call(self, c[..., ::-1], s)",
    "another initializer": "inswapper._extract = lambda path, out: np.save(open(out, 'wb'), np.eye(512, dtype=np.float32))",
    "identity of a BGR crop": "of = arcface.Embedder.of_crop; arcface.Embedder.of_crop = lambda self, c: of(self, c[..., ::-1])",
    "identity without scaling": "arcface._scales_itself = lambda *a: True",
    "restored in BGR": "call = codeformer.OnnxRestorer.__call__; codeformer.OnnxRestorer.__call__ = lambda self, c, w: call(self, c[..., ::-1], w)[..., ::-1]",
    "fidelity upside down": "call = codeformer.OnnxRestorer.__call__; codeformer.OnnxRestorer.__call__ = lambda self, c, w: call(self, c, 1 - w)",
}

CONTRACTS = """
import numpy as np
from avlab.swap import arcface, codeformer, inswapper
from avlab.swap.tiny_onnx import contract_embedder, contract_restorer, contract_swapper
from avlab.weights import locate
broken = {}
for name, mutation in json.loads(sys.argv[1]).items():
    kept = [(o, n, getattr(o, n)) for o, n in ((inswapper.Emap, "source_vector"), (inswapper.InswapperNet, "__call__"), (inswapper, "_extract"),
        (arcface.Embedder, "of_crop"), (arcface, "_scales_itself"), (codeformer.OnnxRestorer, "__call__"))]
    inswapper._emap.cache_clear(); os.environ["AVLAB_CACHE"] = os.path.join(sys.argv[2], str(len(broken)))
    exec(mutation)
    net = inswapper.InswapperNet(locate("inswapper_128"), "cpu")
    broken[name] = [contract_embedder(arcface.Embedder(provider="cpu").of_crop), contract_swapper(lambda c, e: net(c, net.emap.source_vector(e))),
        contract_restorer(codeformer.OnnxRestorer(locate("codeformer_onnx"), "cpu"))]
    for o, n, f in kept: setattr(o, n, f)
print(json.dumps(broken))
"""


def test_every_mutation_of_our_own_callers_is_caught(tiny, tmp_path):
    broken = fresh(CONTRACTS, json.dumps({"as it is": "pass", **MUTATIONS}), tmp_path, **tiny)
    assert broken.pop("as it is") == [[], [], []]
    assert [n for n, suites in broken.items() if not any(suites)] == []


def test_without_weights_the_reason_names_file_source_and_licence(none):
    told = fresh("""
from avlab.core import AvlabError
from avlab.swap.arcface import Embedder, FaceReader
from avlab.swap.engines import ENGINES, ENHANCERS
told = []
for ask in (lambda: ENGINES.pick("inswapper"), lambda: ENHANCERS.pick("codeformer"), Embedder, FaceReader):
    try: ask()
    except AvlabError as e: told.append((type(e).__name__, str(e)))
print(json.dumps(dict(told=told, auto=[ENGINES.pick().name, ENHANCERS.pick().name])))
""", **none)
    assert [kind for kind, _ in told["told"]] == ["EngineUnavailable"] * 2 + ["ModelMissing"] * 2
    for (_, text), (file, licence) in zip(told["told"], [("inswapper_128.onnx", "non-commercial"), ("codeformer.pth", "NTU S-Lab"), ("w600k_r50.onnx", "non-commercial"), ("buffalo_l", "non-commercial")]):
        assert file in text and licence in text and "https://github.com" in text and "\n" not in text
    assert told["auto"] == ["mesh", "detail"]


def test_a_processor_that_was_asked_for_is_never_replaced(tiny):
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    told = fresh("""
from avlab.core import AvlabError
from avlab.swap.engines import ENGINES
from avlab.swap.inswapper import InswapperNet
from avlab.weights import locate
import onnxruntime
told = []
try: ENGINES.pick("inswapper")
except AvlabError as e: told.append(str(e))
offered = onnxruntime.get_available_providers
onnxruntime.get_available_providers = lambda: ["CUDAExecutionProvider", *offered()] # what a missing CUDA library looks like
onnxruntime.preload_dlls = lambda *a, **k: None
for provider in ("cuda", "auto"):
    try: InswapperNet(locate("inswapper_128"), provider)
    except AvlabError as e: told.append(str(e))
print(json.dumps(told))
""", **{**tiny, "AVLAB_DEVICE": "cuda"})
    assert len(told) == 3 and "does not offer it" in told[0]
    assert all("did not start" in t and "'cpu'" in t for t in told[1:])


def test_without_the_extra_the_hint_says_what_to_install(tmp_path, tiny):
    site = tmp_path / "site"
    site.mkdir()
    for place in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for p in Path(place).iterdir():
            top = p.name.split("-")[0].split(".")[0].lower()
            if p.suffix != ".pth" and top not in ("onnx", "onnxruntime", "insightface") and not (site / p.name).exists():
                (site / p.name).symlink_to(p)
    told = fresh("""
from importlib.util import find_spec
assert not find_spec("onnxruntime")
from avlab.core import AvlabError
from avlab.swap.arcface import FaceReader
from avlab.swap.engines import ENGINES
told = [ENGINES.pick().name]
for ask in (lambda: ENGINES.pick("inswapper"), FaceReader):
    try: ask()
    except AvlabError as e: told.append(str(e))
print(json.dumps(told))
""", site=site, **tiny)
    assert told[0] == "mesh" and len(told) == 3 and all("pip install 'avlab[swap]'" in t for t in told[1:])


def test_the_pipeline_with_both_networks(tiny):
    found = fresh("""
import numpy as np
from avlab.portrait import free_portrait
from avlab.swap.pipeline import SwapPipeline
frame = np.ascontiguousarray(free_portrait("collins")[:320, 60:380])
with SwapPipeline("hopper", engine="inswapper", enhance="codeformer", fidelity=.5) as p:
    out, t = p.process(frame)
    print(json.dumps(dict(engine=p.engine, faces=t.faces, same_shape=out.shape == frame.shape, changed=bool((out[:200] != frame[:200]).any()), enhance=t.enhance_ms > 0)))
""", **tiny)
    assert found == dict(engine="inswapper", faces=1, same_shape=True, changed=True, enhance=True)


def here(*names):
    from avlab.weights import missing

    return [n for n in names if missing(n)]


def test_real_inswapper():
    if gone := here("inswapper_128", "w600k_r50"):
        pytest.skip(f"weights are not on this machine: {', '.join(gone)}")
    found = fresh(START + """
from avlab.swap.inswapper import contract_engine
engine = ENGINES.pick("inswapper").engine
sources = tuple(prepare_source(n, embed=engine.embed) for n in ("hopper", "collins"))
out = target.copy(); engine.open(sources[0])(out, mesh)
after = engine.embed(out, face_of(out))
print(json.dumps(dict(broken=contract_engine(engine, sources, target, mesh), to_source=float(after @ sources[0].embedding), to_target=float(after @ sources[1].embedding))))
""")
    assert found["broken"] == [] and found["to_source"] > max(.4, found["to_target"])


def test_real_codeformer():
    if gone := here("codeformer"):
        pytest.skip(f"weights are not on this machine: {', '.join(gone)}")
    found = fresh(START + """
import cv2
work = ENHANCERS.pick("codeformer").engine.open(.75)
soft = cv2.GaussianBlur(target, (0, 0), 2.); out = soft.copy(); x0, y0, x1, y1 = work(out, mesh)
sharp = lambda p: float(cv2.Laplacian(cv2.cvtColor(p[y0:y1, x0:x1], cv2.COLOR_RGB2GRAY), cv2.CV_32F).var())
print(json.dumps(dict(before=sharp(soft), after=sharp(out), apart=float(np.abs(out.astype(int) - target)[y0:y1, x0:x1].mean()))))
""")
    assert found["after"] > 1.5 * found["before"] and found["apart"] < 20
