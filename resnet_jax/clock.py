"""The seconds that a run takes, over all the processes that worked on it."""

import dataclasses
import time


@dataclasses.dataclass
class Clock:
    """Starts on construction.

    Attributes:
      training: seconds spent in calls that train.
      compiling: seconds that the start-up waited for programs.
      evaluating: seconds spent in evaluations.
    """

    training: float = 0.0
    compiling: float = 0.0
    evaluating: float = 0.0
    _earlier: float = 0.0
    _start: float = dataclasses.field(default_factory=time.perf_counter)

    @property
    def total(self) -> float:
        return self._earlier + time.perf_counter() - self._start

    def record(self) -> dict[str, float]:
        """The seconds so far, for a checkpoint."""
        return {
            "total": self.total,
            "training": self.training,
            "compiling": self.compiling,
            "evaluating": self.evaluating,
        }

    def add(self, record: dict[str, float]) -> None:
        """Adds the seconds of earlier processes, as a checkpoint stores them."""
        self._earlier += record["total"]
        self.training += record["training"]
        self.compiling += record["compiling"]
        self.evaluating += record.get("evaluating", 0.0)  # old ones do not tell
