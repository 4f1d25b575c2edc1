"""Metrics of the engine for Prometheus."""

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

BATCHES = (1, 2, 4, 8, 16, 32, 64)
SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)


class Metrics:
    """An observer of `Engine`. images/s is rate(jaxdiff_images_total)."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        more: Any = {"registry": self.registry}
        self._waiting = Gauge("jaxdiff_queue_images", "Images waiting in the queue.", **more)
        self._images = Counter("jaxdiff_images", "Images drawn.", **more)
        self._failed = Counter("jaxdiff_failed_requests", "Requests that ended without their images.", **more)
        self._cancelled = Counter("jaxdiff_cancelled_images", "Images cancelled before they were finished.", **more)
        self._batch = Histogram("jaxdiff_batch_images", "Images per batch.", buckets=BATCHES, **more)
        self._seconds = Histogram("jaxdiff_batch_seconds", "Time of a batch.", buckets=SECONDS, **more)
        self._latency = Histogram(
            "jaxdiff_request_seconds", "Time from a request to its images.", buckets=SECONDS, **more
        )

    def observe(self, what: str, number: float) -> None:
        """What `Engine` reports."""
        if what == "waiting":
            self._waiting.set(number)
        elif what in ("batch", "seconds", "latency"):
            {"batch": self._batch, "seconds": self._seconds, "latency": self._latency}[what].observe(number)
        else:
            {"images": self._images, "failed": self._failed, "cancelled": self._cancelled}[what].inc(number)

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)
