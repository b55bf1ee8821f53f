"""A seeded fuzz: what a case is, under which limits it runs, and what comes of it.

1. A case mutates an input, hands it to the package (`act`), and judges what comes back (`judge`)
   by an oracle that is not the package.
2. It is right, or refused by an error of ours. All else is a fault: a foreign exception, a wrong
   answer, more than 10 seconds, more than 1 GB, a socket, a process, anything unpickled or run.
3. Time is that of the processor. Sockets and code are trapped by Python's own audit events.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
import resource
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import torch

import lens_lora as ll

SECONDS = 10.0
BYTES = 10**9
RIGHT = "right"
REFUSED = "refused"
# A module that only what a mutated file names would import; a prefix that only it would open.
PLANTED = "lens_lora_planted"
_TRAPPED = (
    "socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "urllib.Request", "os.system",
    "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "pickle.find_class",
)  # fmt: skip


class Wrong(AssertionError):
    """An answer that the oracle does not give."""


class UsersOwn(Exception):
    """Raised by a user's own hook or readout: it must come back as it is."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One input.

    Attributes:
        target: what is mutated, for the table.
        mutation: how, for the table.
        act: hands the input to the package and returns what it gives.
        judge: raises `Wrong` if the answer is not the oracle's.
        shown: the input, as far as a fault's report needs it.
    """

    target: str
    mutation: str
    act: Callable[[], Any]
    judge: Callable[[Any], None]
    shown: str = ""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a case: 'right', 'refused' or a fault.

    Attributes:
        kind: of these.
        detail: the class of the refusal, or the report of a fault.
    """

    kind: str
    detail: str = ""

    @property
    def is_fault(self) -> bool:
        return self.kind not in (RIGHT, REFUSED)


class TimeUp(BaseException):
    """The case has used its time."""


class _Trap:
    """Audit events are noted while it is set; hooks of this kind cannot be removed."""

    def __init__(self) -> None:
        self.is_set = False
        self.events: list[str] = []
        sys.addaudithook(self._note)

    def _note(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.is_set:
            return
        planted = event in ("open", "import") and PLANTED in str(args[0])
        if planted or event in _TRAPPED:
            self.events.append(f"{event} {str(args)[:200]}")


_trap: _Trap | None = None


def trap() -> _Trap:
    """The one trap of this process."""
    global _trap
    _trap = _trap or _Trap()
    return _trap


def run(case: Case) -> Outcome:
    """The case within its limits, and its judgement outside of them."""
    found = None
    outcome = None
    resident = _forget_peak()
    began = time.process_time()
    with _limits(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = case.act()
        except ll.errors.LensLoraError as error:
            outcome = _refusal(error)
        except UsersOwn:
            outcome = Outcome(RIGHT, "the user's own exception")
        except TimeUp:
            outcome = Outcome("slow", f"more than {SECONDS:.0f} s")
        except (Exception, SystemExit) as error:
            outcome = Outcome(f"foreign {type(error).__name__}", traceback.format_exc())
    if trap().events:
        return Outcome("trapped", "; ".join(trap().events))
    if time.process_time() - began > SECONDS:
        return Outcome("slow", f"{time.process_time() - began:.1f} s")
    if _kept("VmHWM") - resident > BYTES:
        return Outcome("memory", f"{(_kept('VmHWM') - resident) / 1e9:.2f} GB")
    return outcome or _judged(case, found)


def _judged(case: Case, found: Any) -> Outcome:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            case.judge(found)
    except Wrong as error:
        return Outcome("wrong", str(error))
    return Outcome(RIGHT)


def _refusal(error: Exception) -> Outcome:
    if not 10 <= len(str(error)) <= 20_000:
        return Outcome("no message", f"{type(error).__name__} of {len(str(error))} characters")
    return Outcome(REFUSED, type(error).__name__)


@contextlib.contextmanager
def _limits() -> Generator[None]:
    """Time, and the traps; a limit of address space guards the machine itself."""

    def up(number: int, frame: object) -> None:
        raise TimeUp

    old = signal.signal(signal.SIGPROF, up)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    space = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + 16 * BYTES, space[1]))
    trap().events.clear()
    trap().is_set = True
    try:
        yield
    finally:
        trap().is_set = False
        resource.setrlimit(resource.RLIMIT_AS, space)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, old)


def _forget_peak() -> int:
    """How much memory is resident; the kernel's peak starts from there again."""
    Path("/proc/self/clear_refs").write_text("5")
    return _kept("VmRSS")


def _kept(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def require_close(found: torch.Tensor, wanted: torch.Tensor, what: str, tol: float = 1e-9) -> None:
    """Equal to within the tolerance, relative to the larger of 1 and the wanted size.

    Raises:
        Wrong: they are not.
    """
    if found.shape != wanted.shape:
        raise Wrong(f"{what}: shape {tuple(found.shape)} for {tuple(wanted.shape)}")
    error = (found.double() - wanted.double()).abs().max()
    size = max(1.0, float(wanted.abs().max()))
    if not error <= tol * size:
        raise Wrong(f"{what}: off by {float(error):.3g} of {size:.3g}")


class Chance(random.Random):
    """The random choices of one case, all from its seed."""

    def maybe(self, share: float) -> bool:
        return self.random() < share

    def text(self, longest: int = 12) -> str:
        """Of letters, spaces, quotes, controls, other scripts, halves of surrogate pairs."""
        alphabet = "w5w6w7 \t\n\0'\"<>&\\{}[]*?.é０²½\u202eЖ漢😀\ud800\udfff"
        return "".join(self.choices(alphabet, k=self.randint(0, longest)))

    def number(self) -> Any:
        """Any number that is not one of the usual ones, with some that are."""
        return self.choice(
            [
                0, 1, -1, 2, 3, 0.5, -0.0, 1.5, 1e-300, 1e307, -1e308, float("nan"), float("inf"),
                float("-inf"), 2**31, 2**63 - 1, 2**63, 2**64, -(2**63), 10**400, True, False, 1j,
            ]
        )  # fmt: skip

    def value(self, depth: int = 2) -> Any:
        """Anything that JSON can hold."""
        kinds = ["number", "text", "none", "list", "table"] if depth else ["number", "text", "none"]
        kind = self.choice(kinds)
        if kind == "number":
            found = self.number()
            return str(found) if isinstance(found, complex) else found
        if kind == "text":
            return self.text()
        if kind == "list":
            return [self.value(depth - 1) for _ in range(self.randint(0, 3))]
        if kind == "table":
            return {self.text(4): self.value(depth - 1) for _ in range(self.randint(0, 3))}
        return None
