"""GetStats: what people ask a server first. Prometheus has nearly the same, and more."""

from protos.equiserve.v1 import policy_pb2 as pb
from serving.dispatcher import Dispatcher
from serving.metrics import Metrics
from serving.recorder import Recorder
from serving.sessions import Sessions


def stats_of(
    metrics: Metrics, dispatcher: Dispatcher, sessions: Sessions, recorder: Recorder | None
) -> pb.GetStatsResponse:
    """Everything since the start; latencies of the last calls that were answered."""
    made = pb.GetStatsResponse
    return made(
        uptime_s=metrics.uptime_s,
        calls=[made.Calls(method=m, code=c, count=n) for (m, c), n in metrics.call_counts().items()],
        latencies=[
            made.Latency(phase=phase, p50_ms=p50, p95_ms=p95, p99_ms=p99, max_ms=longest, samples=samples)
            for phase, (p50, p95, p99, longest, samples) in metrics.quantiles_ms().items()
        ],
        interventions=[made.Rule(field=f, rule=r, count=n) for (f, r), n in metrics.intervention_counts().items()],
        running=dispatcher.running,
        waiting=dispatcher.waiting,
        open_episodes=len(sessions),
        recorded=recorder.recorded if recorder else 0,
        dropped=recorder.dropped if recorder else 0,
        expired=dispatcher.expired,
    )
