"""The page that Prometheus reads, as tests look at it."""

import asyncio
import urllib.request

from prometheus_client.parser import text_string_to_metric_families


async def metrics_of(port):
    """Read the page; return a function that gives the value of a sample, None where there is none."""
    text = await asyncio.to_thread(_read, port)
    samples = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }

    def value(name, **labels):
        return samples.get((name, tuple(sorted(labels.items()))))

    return value


def _read(port):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as answer:
        return answer.read().decode()
