"""
The process in which a student's functions run: it knows no answers, and it is limited and guarded.

A nursery starts once, from a fresh copy of the repository without answers, hints and tests, and imports torch and the
repository. For each exercise it forks a child. The child loses the repository's own solution, then gets an audit hook
that cannot be taken off again, then imports the student's file and runs the cases. What it sends back are numbers;
whoever asked compares them. Nothing that a child does is there for the next one.
"""

import base64
import gzip
import hashlib
import importlib
import importlib.util
import inspect
import json
import os
import resource
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
TO_START, FILE_SECONDS = 240, 120  # to import torch; for all exercises of a file
SECONDS = int(os.environ.get("EXERCISE_SECONDS", 45))  # for an exercise, much, for busy machines
CPU_SECONDS = min(15, SECONDS)
MEMORY, OUTPUT, REPLY = 3 << 30, 1 << 20, 64 << 20  # bytes: above those at the start; printed or written; sent back
LEFT_OUT = ("checks*", "answers*", "hints*", "expected*", "model_answers*", "test_*", "bench*", "*.safetensors",
            "*.png", "*.jsonl", ".*", "out", "__pycache__", "tiny-organism-*", "tiny-truths")  # fmt: skip


# ----------------------------------------------------------------------------------------------- in the child's process

FORBIDDEN = (
    "os.fork", "os.exec", "os.posix_spawn", "os.spawn", "os.startfile", "os.system", "subprocess.", "pty.", "ctypes.",
    "socket.", "os.kill", "signal.pthread_kill", "gc.get_", "sys._current", "sys.settrace", "sys.setprofile",
    "sys.addaudithook", "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate",
    "os.chmod", "os.chown", "shutil.", "sqlite3.", "code.__new__", "cpython.", "os.putenv", "mmap.",
)  # fmt: skip
FRAMES = ("tb_frame", "gi_frame", "cr_frame", "ag_frame", "__code__", "__globals__", "__closure__")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def guard(own: Path, closed: list[Path]):
    """The audit hook: files of `closed` cannot be read, none can be written, no process made, no frame looked into."""
    own, closed = os.path.realpath(own), [os.path.realpath(path) + os.sep for path in closed]
    trusted = tuple({os.path.realpath(p) + os.sep for p in (sys.prefix, sys.base_prefix, os.path.dirname(os.__file__))})
    ours, frame_of, busy, realpath = (*trusted, *closed), sys._getframe, [], os.path.realpath
    library = os.path.dirname(os.__file__)
    looks = tuple(os.path.join(library, f"{name}.py") for name in ("inspect", "traceback", "warnings"))

    def from_outside() -> bool:
        """Whether the code that asks is neither a library's nor the repository's."""
        frame = frame_of(2)
        while frame and frame.f_code.co_filename in looks:
            frame = frame.f_back
        name = realpath(frame.f_code.co_filename) if frame else ""
        return name == own or not (name.startswith(ours) or name.startswith("<frozen"))

    def hook(event, args):
        if busy:
            return
        busy.append(1)
        try:
            if event == "open":
                check_file(*args[:3])
            elif event.startswith(FORBIDDEN):
                raise PermissionError(f"{event} is not allowed while an exercise is checked")
            elif event in ("exec", "compile", "sys._getframe") or (event == "object.__getattr__" and args[1] in FRAMES):
                if from_outside() and not (event in ("exec", "compile") and imports(event, args)):
                    what = args[1] if event == "object.__getattr__" else event
                    raise PermissionError(f"{what} is not allowed while an exercise is checked")
        finally:
            busy.pop()

    def imports(event, args) -> bool:
        """The student's file itself is compiled and executed by the import system, whose frames are frozen."""
        frame = frame_of(2)
        return frame is not None and frame.f_code.co_filename.startswith("<frozen importlib")

    def check_file(path, mode, flags):
        if isinstance(path, int):
            return
        path = realpath(os.fsdecode(path))
        written = (isinstance(mode, str) and set(mode) & set("wax+")) or (isinstance(flags, int) and flags & WRITES)
        if written and path != "/dev/null":
            raise PermissionError(f"{path} cannot be written while an exercise is checked")
        hidden = path.startswith(tuple(closed)) and not path.startswith(trusted)
        process = path.startswith("/proc/") and not path.endswith(("info", "statm", "status"))
        if (hidden or process) and path != own:
            raise PermissionError(f"{path} cannot be read while an exercise is checked")

    sys.addaudithook(hook)


def missing(*given, **more):
    raise NotImplementedError("the repository's own solution is not there while yours is checked")


def imported(path: str):
    """The student's file as the module `student`."""
    spec = importlib.util.spec_from_file_location("student", path)
    module = sys.modules["student"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def functions_of(student, exercises) -> dict:
    """{number: function} of those that the file itself defines."""
    found = {number: vars(student).get(e.name) for number, e in exercises.items()}
    return {n: fn for n, fn in found.items() if callable(fn) and getattr(fn, "__module__", None) == "student"}


def limit(folder: str) -> None:
    os.setsid()
    for name, most in (("CPU", CPU_SECONDS), ("FSIZE", OUTPUT), ("CORE", 0), ("AS", None)):
        if most is None:  # torch maps several GB before anything is computed
            try:
                most = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + MEMORY
            except OSError:
                continue
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))
    said = os.open(os.path.join(folder, "output.txt"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    nothing = os.open("/dev/null", os.O_RDONLY)
    for fd, to in ((nothing, 0), (said, 1), (said, 2)):
        os.dup2(fd, to)
    os.chdir(folder)


def child(exercises: dict, outputs, folder: str, number: str, seed: int, closed: list[str]) -> dict:
    """Run the student's file and the cases of one exercise."""
    exercise, path = exercises[number], os.path.join(folder, "student.py")
    names = list(inspect.signature(inspect.unwrap(exercise.ours)).parameters)
    inspect.unwrap(exercise.ours).__code__ = missing.__code__  # wherever the function is held, it is gone
    others = {e.name: e.ours for e in exercises.values()}
    for name in ("judge", "table", "process", "conftest", "cases", "cases_rl", "cases_steering", "cases_inside"):
        sys.modules.pop(name, None)
    sys.dont_write_bytecode = True
    guard(Path(path), list(map(Path, closed)))
    try:
        student = imported(path)
    except (Exception, SystemExit) as error:  # whatever the file raises is what there is to say about it
        where = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        return {"unusable": f"the file cannot be imported{where}: {type(error).__name__}: {error}"[:1000]}
    theirs = functions_of(student, exercises)
    if number not in theirs:
        return {"absent": exercise.name, "others": sorted(theirs)}
    # each is checked among the repository's: a slip in one is not a slip in the next
    vars(student).update({exercises[n].name: others[exercises[n].name] for n in theirs if n != number})
    return outputs(exercise, theirs[number], seed, names)


def nursery(pipe: int, closed: str) -> None:
    """Read requests as lines of JSON, fork a child for each, write its reply."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(HERE), str(ROOT / "data" / "tiny")]
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    from cases import EXERCISES
    from judge import outputs
    from table import PROGRAMS

    torch.set_num_threads(1)
    for name in PROGRAMS:
        importlib.import_module(name)
    unpack(EXERCISES, Path(closed) / "tests" / "assignments" / "expected.json.gz")
    for exercise in EXERCISES.values():
        assert exercise.ours
    replies = os.fdopen(pipe, "w")
    print(json.dumps({}), file=replies, flush=True)
    for line in sys.stdin:
        given = json.loads(line)
        read, write = os.pipe()
        key = secrets.token_hex(8)
        pid = os.fork()
        if pid == 0:
            try:
                os.close(read), os.close(pipe)
                limit(given["folder"])
                found = child(EXERCISES, outputs, **given, closed=[str(ROOT), closed])
                send(write, key + json.dumps(found) + "\n")
            finally:
                os._exit(0)
        os.close(write)
        print(json.dumps(watch(pid, read, key)), file=replies, flush=True)


def unpack(exercises: dict, path: Path) -> None:
    """In a student's edition: the functions that are stubs, for the checks of the others."""
    packed = json.loads(gzip.decompress(path.read_bytes()))["packed"] if path.is_file() else {}
    for number, text in packed.items():
        exercise = exercises[number]
        scope = dict(vars(importlib.import_module(exercise.module)))
        exec(zlib.decompress(base64.b85decode(text)), scope)
        inspect.unwrap(exercise.ours).__code__ = inspect.unwrap(scope[exercise.name]).__code__


def send(pipe: int, text: str) -> None:
    left = text.encode()
    while left:
        left = left[os.write(pipe, left) :]


def watch(pid: int, pipe: int, key: str) -> dict:
    """What the child sends; it and whatever it has started are ended."""
    end, data, why = time.monotonic() + SECONDS, b"", ""
    while not data.endswith(b"\n"):
        ready, _, _ = select.select([pipe], [], [], max(0.0, end - time.monotonic()))
        piece = os.read(pipe, 1 << 16) if ready else b""
        if not piece or len(data) > REPLY:
            why = "" if ready else f"no answer within {SECONDS} s; is there an endless loop?"
            break
        data += piece
    done, status = os.waitpid(pid, os.WNOHANG)
    try:
        os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL) if not done else None
    if not done:
        status = os.waitpid(pid, 0)[1]
    os.close(pipe)
    for line in data.decode(errors="replace").splitlines():
        if line.startswith(key):
            return json.loads(line.removeprefix(key))
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU:
        why = f"no answer after {CPU_SECONDS} s of computing; is there an endless loop?"
    return {"killed": why or "the process ended"}


# ----------------------------------------------------------------------------------------------------- the one who asks


def left_out(folder: str, names: list[str]) -> set[str]:
    environments = {name for name in names if os.path.exists(os.path.join(folder, name, "pyvenv.cfg"))}
    return environments | shutil.ignore_patterns(*LEFT_OUT)(folder, names)


def checksum(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return digest.hexdigest()


class Nursery:
    """The other side of `nursery`: starts it from a fresh copy of the repository, and anew if something was changed."""

    def __init__(self):
        self.process = None

    def start(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="exercises-"))
        copy = self.folder / "repository"
        shutil.copytree(ROOT, copy, ignore=left_out)
        self.copy, self.before = copy, checksum(copy)
        self.pipe, theirs = os.pipe()
        code = f"import sys; sys.path.insert(0, {str(copy / 'tests' / 'assignments')!r}); import process; "
        code += f"process.nursery({theirs}, {str(ROOT)!r})"
        kinds = dict(stdin=subprocess.PIPE, text=True, pass_fds=[theirs], start_new_session=True, cwd=copy)
        quiet = dict(stdout=subprocess.DEVNULL, env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"})
        self.process = subprocess.Popen([sys.executable, "-P", "-c", code], **kinds, **quiet)
        os.close(theirs)
        self.waiting = b""
        if self.reply(TO_START) is None:
            raise RuntimeError("the process for students' files does not start")

    def reply(self, seconds: float) -> dict | None:
        end = time.monotonic() + seconds
        while b"\n" not in self.waiting:
            ready, _, _ = select.select([self.pipe], [], [], max(0.0, end - time.monotonic()))
            piece = os.read(self.pipe, 1 << 16) if ready else b""
            if not piece:
                return None
            self.waiting += piece
        line, _, self.waiting = self.waiting.partition(b"\n")
        return json.loads(line)

    def ask(self, path: Path, number: str, seed: int) -> dict:
        """What the function of an exercise in the file gives; with "said", the end of what it printed."""
        if self.process is None:
            self.start()
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        shutil.copy(path, folder / "student.py")
        print(json.dumps({"folder": str(folder), "number": number, "seed": seed}), file=self.process.stdin, flush=True)
        found = self.reply(SECONDS + 60)
        if found is None:
            found = {"killed": "the process ended"}
        said = folder / "output.txt"
        text = said.read_text(errors="replace")[-2000:] if said.is_file() else ""
        if said.is_file() and said.stat().st_size >= OUTPUT and "error" in found:
            found = {"killed": f"it printed more than {OUTPUT >> 20} MB"}
        shutil.rmtree(folder, ignore_errors=True)
        if not self.unchanged():
            found = {"killed": "the file changed the checks; they were made anew for the next one"}
            self.stop()
        elif self.process.poll() is not None:
            self.stop()
        return found | ({"said": text} if text else {})

    def unchanged(self) -> bool:
        return self.copy.is_dir() and checksum(self.copy) == self.before

    def stop(self) -> None:
        if self.process:
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            self.process.communicate()
            os.close(self.pipe)
            self.process = None
            shutil.rmtree(self.folder, ignore_errors=True)


class Worker:
    """A student's file: its exercises, one after the other, with a limit on the time of all together."""

    def __init__(self, path: str, nursery: Nursery | None = None):
        self.path, self.nursery, self.own, self.left = Path(path), nursery or Nursery(), nursery is None, FILE_SECONDS
        self.unusable = None

    def ask(self, number: str, seed: int) -> dict:
        if self.unusable:
            return {"error": self.unusable}
        if self.left <= 0:
            return {"error": f"not run: the {FILE_SECONDS} s of this file are used up", "killed": True}
        if self.nursery.process is None:
            self.nursery.start()
        began = time.monotonic()
        found = self.nursery.ask(self.path, number, seed)
        self.left -= time.monotonic() - began
        if "unusable" in found:
            self.unusable = found["unusable"]
            return {"error": self.unusable}
        if "killed" in found:
            return {"error": f"it was ended: {found['killed']}", "killed": True, "said": found.get("said", "")}
        return found

    def stop(self) -> None:
        if self.own:
            self.nursery.stop()
