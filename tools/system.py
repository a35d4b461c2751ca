"""System libraries and the browser: what pip can't install. Standard library only, so it runs before anything else.

    python3.11 tools/system.py            the libraries OpenCV and mediapipe open
    python3.11 tools/system.py browser    and Chromium, for the tests of the site

Only what is missing is installed, on Debian and Ubuntu by apt-get (through sudo for an ordinary user). Elsewhere it says what to install."""
import ctypes, os, shutil, subprocess, sys

LIBRARIES = {"libGL.so.1": "libgl1", "libEGL.so.1": "libegl1", "libGLESv2.so.2": "libgles2", "libglib-2.0.so.0": "libglib2.0-0"}
BROWSERS = ("chromium", "chromium-browser", "google-chrome")

def loads(name):
    try: ctypes.CDLL(name)
    except OSError: return False
    return True

def missing(browser=False):
    "Debian packages for what is not here."
    need = [p for n, p in LIBRARIES.items() if not loads(n)] if sys.platform.startswith("linux") else []
    if browser and not (os.environ.get("AVLAB_CHROMIUM") or any(map(shutil.which, BROWSERS))): need.append("chromium")
    return need

def install(packages):
    apt = shutil.which("apt-get")
    root = [] if os.geteuid() == 0 else ["sudo"]
    if not apt or (root and not shutil.which("sudo")):
        why = "this system has no apt-get" if not apt else "installing needs root and there is no sudo"
        sys.exit(f"Missing: {', '.join(packages)} (Debian's names; {why}). Install them with your system's package manager and run this again."
                 + (" AVLAB_CHROMIUM may name another Chromium or Chrome." if "chromium" in packages else ""))
    print("installing", *packages, flush=True)
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    keep = ["env", "DEBIAN_FRONTEND=noninteractive"]
    subprocess.run([*root, *keep, apt, "update", "-qq"], env=env, stdout=subprocess.DEVNULL)
    done = subprocess.run([*root, *keep, apt, "install", "-y", "-qq", "--no-install-recommends", *packages], env=env, capture_output=True, text=True)
    if done.returncode: sys.exit(f"apt-get could not install {', '.join(packages)}: {done.stderr.strip().splitlines()[-1:] or 'no reason given'}")

if __name__ == "__main__":
    browser = "browser" in sys.argv[1:]
    if need := missing(browser): install(need)
    if left := missing(browser): sys.exit(f"Still missing after installing: {', '.join(left)}.")
