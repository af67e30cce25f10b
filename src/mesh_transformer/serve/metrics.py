"""Figures for Prometheus: what passes through HTTP is counted here, what the engine does is read from it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from mesh_transformer.engine.service import EngineService

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 600.0)
_SECONDS_A_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Metrics:
    """The figures of one server, in a registry of their own."""

    def __init__(self, service: EngineService) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "mesh_transformer_requests", "Requests answered", ["endpoint", "status"], registry=self.registry
        )
        self.request_seconds = Histogram(
            "mesh_transformer_request_seconds",
            "From a request's arrival to the end of its answer",
            ["endpoint"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.first_token_seconds = Histogram(
            "mesh_transformer_time_to_first_token_seconds",
            "From the queue to a request's first token",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.token_seconds = Histogram(
            "mesh_transformer_time_per_output_token_seconds",
            "Between tokens after the first, mean of a completion",
            buckets=_SECONDS_A_TOKEN,
            registry=self.registry,
        )
        self.streams = Gauge("mesh_transformer_streams", "Streams under way", registry=self.registry)
        self.gone = Counter(
            "mesh_transformer_clients_gone", "Requests whose client left before the end", registry=self.registry
        )
        self.slow = Counter(
            "mesh_transformer_slow_readers", "Answers cut because they were not taken", registry=self.registry
        )
        self.registry.register(_EngineFigures(service))


class _EngineFigures(Collector):
    def __init__(self, service: EngineService) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        load = self._service.load()
        gauges = {
            "ready": ("1 once every program has been compiled", int(self._service.ready)),
            "queue_length": ("Completions that wait for a slot", load.waiting),
            "slots_used": ("Completions under way", load.running),
            "slots": ("Completions that can be under way at one time", load.slots),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(f"mesh_transformer_{name}", text, value=value)
        counters = {
            "prompt_tokens": ("Tokens of prompts", load.prompt_tokens),
            "cached_prompt_tokens": ("Tokens of prompts taken over from earlier requests", load.cached_tokens),
            "generated_tokens": ("Tokens written", load.generated_tokens),
            "engine_steps": ("Steps of the engine", load.steps),
            "engine_step_failures": ("Steps of the engine that failed", load.failures),
            "compilations": ("Programs compiled; grows while warming up alone", load.compiled),
        }
        for name, (text, value) in counters.items():
            yield CounterMetricFamily(f"mesh_transformer_{name}", text, value=value)
