"""SIGTERM and SIGINT: the run ends within seconds, where nothing is lost."""

import os
import signal
import socket
import sys
import threading
import time

from resnet_jax import UserError

AT_THE_END = "after the last update, which is saved"
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_STARTUP_SECONDS = 10  # for Python's handler to run, between two compilations
_ECHO_SECONDS = 1  # `timeout` sends each of its signals twice


class StoppedError(UserError):
    """A signal ended the run; the same command resumes it."""

    label = "stopped"

    def __init__(self, received: signal.Signals, where: str):
        super().__init__(f"by {received.name} {where}: the same command resumes it")
        self.exit_status = 128 + received  # as in shells


class Interrupt(BaseException):
    """A signal during the start-up, which `Preemption` re-raises as a StoppedError.

    No `except Exception` on the way, here or in a library, mistakes it for a failure.
    """

    def __init__(self, received: signal.Signals):
        super().__init__()
        self.error = StoppedError(received, "while starting")


class Preemption:
    """While entered, a first SIGTERM or SIGINT requests a stop, a second forces it.

    A start-up has nothing to save: there even the first one ends it.

    Attributes:
      received: the signal that came, else None.
    """

    def __init__(self):
        self.received: signal.Signals | None = None
        self._starting = self._saves = False

    def __enter__(self) -> "Preemption":
        self._installed = threading.current_thread() is threading.main_thread()
        if self._installed:
            self._reader, self._writer = socket.socketpair()
            self._writer.setblocking(False)
            self._wakeup = signal.set_wakeup_fd(self._writer.fileno())
            self._handlers = {
                number: signal.signal(number, self._handle) for number in _SIGNALS
            }
            self._watcher = threading.Thread(target=self._watch, daemon=True)
            self._watcher.start()
        self._starting = True
        return self

    def __exit__(self, _, raised: BaseException | None, __) -> None:
        self._starting = False  # a timer may still be running
        if self._installed:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._wakeup)
            self._writer.close()
            self._watcher.join()
            self._reader.close()
        if isinstance(raised, Interrupt):
            raise raised.error from None
        if self.received and raised is None:  # it came after the run's last look
            raise StoppedError(self.received, AT_THE_END)

    def started(self) -> None:
        """From here on there is something to save: a signal waits for `received`."""
        self._starting, self._saves = False, True
        if self.received:
            raise StoppedError(self.received, "while starting")

    def _handle(self, number: int, _) -> None:
        if self._starting:
            raise Interrupt(signal.Signals(number))

    def _watch(self) -> None:
        """Runs in a thread, as Python's handlers wait for device calls to return."""
        first = 0.0
        while received := self._reader.recv(1):
            if received[0] not in _SIGNALS:
                continue
            number = signal.Signals(received[0])
            if self.received:
                if time.monotonic() - first > _ECHO_SECONDS:
                    _exit(number, "immediately, on a second signal")
                continue
            self.received, first = number, time.monotonic()
            if self._starting:
                timer = threading.Timer(_STARTUP_SECONDS, self._abandon, [number])
                timer.daemon = True
                timer.start()
            elif self._saves:
                print(
                    f"\n{number.name}: saving at the end of this call; "
                    "a second signal ends the run at once",
                    file=sys.stderr,
                )

    def _abandon(self, number: signal.Signals) -> None:
        if self._starting:
            _exit(number, "while starting")


def _exit(number: signal.Signals, where: str) -> None:
    error = StoppedError(number, where)
    print(f"{error.label}: {error}", file=sys.stderr, flush=True)
    os._exit(error.exit_status)
