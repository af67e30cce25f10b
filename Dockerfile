# The server in a container: docker build --tag mesh-transformer .
# For NVIDIA GPUs: docker build --build-arg EXTRAS=serve,cuda12 --tag mesh-transformer:cuda12 .
# How to run it: docs/deployment.md.
ARG PYTHON=3.11

FROM python:${PYTHON}-slim-bookworm AS build
ARG EXTRAS=serve
WORKDIR /source
RUN python -m venv /opt/mesh-transformer
# The native extension needs a compiler to be built, and nothing to run.
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
COPY constraints.txt pyproject.toml CMakeLists.txt README.md LICENSE ./
COPY third_party third_party
COPY src src
# The versions that the tests were run with. What `cuda12` and `cuda13` bring beyond them follows from the pinned jax.
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/mesh-transformer/bin/python -m pip install --disable-pip-version-check --constraint constraints.txt ".[${EXTRAS}]"

FROM python:${PYTHON}-slim-bookworm
LABEL org.opencontainers.image.title="mesh-transformer" \
      org.opencontainers.image.description="HTTP server for GPT-J-class language models" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN groupadd --gid 10001 mesh && \
    useradd --uid 10001 --gid 10001 --no-create-home --home-dir /var/cache/mesh-transformer --shell /usr/sbin/nologin mesh && \
    install --directory --owner mesh --group mesh --mode 0700 /var/cache/mesh-transformer
COPY --from=build /opt/mesh-transformer /opt/mesh-transformer
COPY --chmod=0755 deploy/entrypoint.sh /usr/local/bin/entrypoint
# The compiled programs are the only thing that the server writes. HF_HUB_OFFLINE: the model is the one that is mounted.
ENV PATH=/opt/mesh-transformer/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    MESH_TRANSFORMER_CACHE=/var/cache/mesh-transformer \
    HF_HUB_OFFLINE=1 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
WORKDIR /var/cache/mesh-transformer
EXPOSE 8000
STOPSIGNAL SIGTERM
# Not healthy until the model is loaded and every program compiled. http.client, because urllib would ask a proxy.
HEALTHCHECK --interval=10s --timeout=5s --start-period=15m --retries=3 \
    CMD ["python", "-c", "import http.client, sys; c = http.client.HTTPConnection('127.0.0.1', 8000, timeout=4); c.request('GET', '/health'); sys.exit(c.getresponse().status != 200)"]
ENTRYPOINT ["entrypoint"]
CMD ["serve", "/model", "--host", "0.0.0.0", "--port", "8000", "--shutdown-timeout", "30"]
