"""Metrics of the engine for Prometheus."""

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

BATCHES = (1, 2, 4, 8, 16, 32, 64)
SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)


class Metrics:
    """An observer of `Engine`. images/s is rate(jaxdiff_images_total)."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        options: Any = {"registry": self.registry}
        self._waiting = Gauge("jaxdiff_queue_images", "Images waiting in the queue.", **options)
        self._counters = {
            "images": Counter("jaxdiff_images", "Images drawn.", **options),
            "failed": Counter("jaxdiff_failed_requests", "Requests that ended without their images.", **options),
            "cancelled": Counter("jaxdiff_cancelled_images", "Images cancelled before they were finished.", **options),
        }
        self._histograms = {
            "batch": Histogram("jaxdiff_batch_images", "Images per batch.", buckets=BATCHES, **options),
            "seconds": Histogram("jaxdiff_batch_seconds", "Time of a batch.", buckets=SECONDS, **options),
            "latency": Histogram(
                "jaxdiff_request_seconds", "Time from a request to its images.", buckets=SECONDS, **options
            ),
        }

    def observe(self, event: str, value: float) -> None:
        """Record an event of `Engine`."""
        if event == "waiting":
            self._waiting.set(value)
        elif event in self._histograms:
            self._histograms[event].observe(value)
        else:
            self._counters[event].inc(value)

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)
