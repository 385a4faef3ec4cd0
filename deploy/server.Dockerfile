# The policy server: onnxruntime and gRPC, no training framework, no simulator.
#   docker build -f deploy/server.Dockerfile -t equiserve-server .
# deploy/compose.yaml runs it with the policy mounted read-only.

FROM python:3.11-slim-bookworm AS build
RUN python -m venv /opt/equiserve
ENV PATH=/opt/equiserve/bin:$PATH
WORKDIR /src
# Only what the server is made of: with these folders alone, setuptools packs no other package.
COPY pyproject.toml README.md LICENSE ./
COPY protos protos
COPY serving serving
RUN pip install --no-cache-dir "./[serve]"

FROM python:3.11-slim-bookworm
RUN useradd --system --no-create-home --uid 10001 equiserve
COPY --from=build /opt/equiserve /opt/equiserve
ENV PATH=/opt/equiserve/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
USER 10001
EXPOSE 50051
# In plain text: with --tls-cert or another --listen, replace it (compose: healthcheck).
# Loading and proving happen before SERVING: a paper-size policy takes some seconds.
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import sys, grpc; from grpc_health.v1 import health_pb2 as m, health_pb2_grpc as h; sys.exit(h.HealthStub(grpc.insecure_channel('127.0.0.1:50051')).Check(m.HealthCheckRequest(), timeout=2).status != m.HealthCheckResponse.SERVING)"]
ENTRYPOINT ["python", "-m", "serving.server"]
# Inside a container, loopback is the container's own: to be published at all, the server must listen on every address.
# Who can reach it is decided by what is published; compose.yaml publishes to the host's loopback alone.
CMD ["--policy", "/policies/policy.onnx", "--listen", "0.0.0.0:50051", "--insecure"]
