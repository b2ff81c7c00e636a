# Images of neuronguard:
#
#   gateway      the OpenAI endpoint; neither torch nor vLLM
#   engine-cpu   vLLM's CPU build with the guard in it, and the lab model
#   engine-cuda  the official vLLM image with the guard in it
#   load         demonstration traffic
#
# `docker build --target gateway .`; an index or a mirror of one's own: `--secret id=pip_conf,src=pip.conf`.

ARG PYTHON_IMAGE=python:3.11.13-slim-bookworm
# Where packages are installed; only files are taken from it. The same Python as PYTHON_IMAGE.
ARG BUILD_IMAGE=${PYTHON_IMAGE}
ARG VLLM_IMAGE=vllm/vllm-openai:v0.32.0
# For the labels: the release, and the commit that it was built from.
ARG VERSION=0.1.0
ARG REVISION=unknown


# hadolint ignore=DL3006
FROM ${BUILD_IMAGE} AS build
SHELL ["/bin/sh", "-eu", "-c"]
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY scripts scripts


# The project itself, without dependencies: the same files go into every image.
FROM build AS project
COPY guard guard
COPY service service
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    python3 -m venv /build && \
    /build/bin/pip install -c scripts/constraints-cpu.txt setuptools && \
    /build/bin/pip install --no-deps --no-build-isolation --target /opt/neuronguard/lib .


FROM build AS gateway-build
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    python3 scripts/image.py gateway /opt/venv


FROM build AS load-build
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    python3 scripts/image.py load /opt/venv


FROM build AS engine-cpu-build
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    python3 scripts/image.py engine /opt/venv
COPY --from=project /opt/neuronguard/lib /opt/neuronguard/lib
COPY models/lab models/lab
ENV PYTHONPATH=/opt/neuronguard/lib
RUN NEURONGUARD_CACHE=/tmp/cache OMP_NUM_THREADS=1 \
    /opt/venv/bin/python -c "from guard.lab import resolve; print(resolve('models/lab:lab-partial')[0])" \
        > /tmp/made && \
    mkdir -p /opt/neuronguard/models && \
    cp -RL "$(cat /tmp/made)" /opt/neuronguard/models/lab-partial && \
    cp -R models/lab/bundle /opt/neuronguard/models/lab-partial-bundle && \
    chmod -R a+rX /opt/neuronguard


# What all images of ours share: an unprivileged user and no writes beside its home and /tmp.
# hadolint ignore=DL3006
FROM ${PYTHON_IMAGE} AS runtime
RUN groupadd --gid 10001 guard && \
    useradd --uid 10001 --gid guard --create-home --shell /usr/sbin/nologin guard && \
    mkdir /home/guard/.cache && chown guard:guard /home/guard/.cache
ENV PATH=/opt/venv/bin:$PATH PYTHONPATH=/opt/neuronguard/lib \
    PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
WORKDIR /home/guard


FROM runtime AS load
COPY --from=load-build /opt/venv /opt/venv
COPY loadtests/traffic /opt/neuronguard/traffic
USER 10001:10001
ARG VERSION
ARG REVISION
LABEL org.opencontainers.image.title="neuronguard/load" \
      org.opencontainers.image.description="Demonstration traffic for a guarded endpoint" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION" \
      org.opencontainers.image.licenses="Apache-2.0"
ENTRYPOINT ["locust", "--headless", "--locustfile", "/opt/neuronguard/traffic/locustfile.py"]


FROM runtime AS engine-cpu
# vLLM's kernels load libnuma.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends libnuma1 && \
    rm -rf /var/lib/apt/lists/* /var/log/* /var/cache/debconf/*
COPY --from=engine-cpu-build /opt/venv /opt/venv
COPY --from=engine-cpu-build /opt/neuronguard /opt/neuronguard
# As in guard/serve/plan.py: no thread is tied to a core, processes are forked, and nothing is sent anywhere.
ENV VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_WORKER_MULTIPROC_METHOD=fork VLLM_CPU_KVCACHE_SPACE=1 \
    VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1 HF_HUB_OFFLINE=1 NUMBA_CACHE_DIR=/tmp/numba
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=5s --timeout=5s --start-period=15m --retries=6 \
    CMD ["python3", "-m", "guard.healthcheck", "http://127.0.0.1:8000/guard/status"]
ARG VERSION
ARG REVISION
LABEL org.opencontainers.image.title="neuronguard/engine-cpu" \
      org.opencontainers.image.description="vLLM's CPU build with the guard in it, and the lab model" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION" \
      org.opencontainers.image.licenses="Apache-2.0"
ENTRYPOINT ["python3", "-m", "guard.engine", "--host", "0.0.0.0", "--port", "8000"]


# hadolint ignore=DL3006
FROM ${VLLM_IMAGE} AS engine-cuda
USER 0
RUN groupadd --force --gid 10001 guard && \
    (id guard > /dev/null 2>&1 || \
        useradd --uid 10001 --gid guard --create-home --shell /usr/sbin/nologin guard) && \
    mkdir -p /home/guard/.cache && chown guard:guard /home/guard/.cache
COPY --from=project /opt/neuronguard/lib /opt/neuronguard/lib
ENV PYTHONPATH=/opt/neuronguard/lib PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 \
    VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1 HF_HUB_OFFLINE=1
WORKDIR /src
COPY models/lab models/lab
# vLLM brings every package that the guard needs; this fails if it no longer does.
RUN python3 -c "import guard.engine.launch, guard.engine.readiness, guard.engine.metrics" && \
    NEURONGUARD_CACHE=/tmp/cache \
    python3 -c "from guard.lab import resolve; print(resolve('models/lab:lab-partial')[0])" > /tmp/made && \
    mkdir -p /opt/neuronguard/models && \
    cp -RL "$(cat /tmp/made)" /opt/neuronguard/models/lab-partial && \
    cp -R models/lab/bundle /opt/neuronguard/models/lab-partial-bundle && \
    chmod -R a+rX /opt/neuronguard && \
    rm -r /tmp/cache /tmp/made /src/models
WORKDIR /home/guard
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=5s --timeout=5s --start-period=30m --retries=6 \
    CMD ["python3", "-m", "guard.healthcheck", "http://127.0.0.1:8000/guard/status"]
ARG VERSION
ARG REVISION
LABEL org.opencontainers.image.title="neuronguard/engine-cuda" \
      org.opencontainers.image.description="The official vLLM image with the guard in it" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION" \
      org.opencontainers.image.licenses="Apache-2.0"
ENTRYPOINT ["python3", "-m", "guard.engine", "--host", "0.0.0.0", "--port", "8000"]


# Last, so that it is what `docker build .` makes.
FROM runtime AS gateway
COPY --from=gateway-build /opt/venv /opt/venv
COPY --from=project /opt/neuronguard/lib /opt/neuronguard/lib
ENV NEURONGUARD_HOST=0.0.0.0 NEURONGUARD_PORT=8080 NEURONGUARD_METRICS_PORT=9400 \
    NEURONGUARD_ENGINE_URL=http://engine:8000 \
    NEURONGUARD_KEY_FILE=/run/secrets/shared/guard.keys \
    NEURONGUARD_POLICY_FILE=/run/secrets/gateway/policies.yaml
USER 10001:10001
EXPOSE 8080 9400
# Ready, not merely alive: the engine's guard has passed its self-test and every policy fits its bundle.
HEALTHCHECK --interval=5s --timeout=5s --start-period=30m --retries=6 \
    CMD ["python3", "-m", "guard.healthcheck", "http://127.0.0.1:8080/readyz"]
ARG VERSION
ARG REVISION
LABEL org.opencontainers.image.title="neuronguard/gateway" \
      org.opencontainers.image.description="The OpenAI endpoint in front of guarded vLLM engines" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION" \
      org.opencontainers.image.licenses="Apache-2.0"
ENTRYPOINT ["python3", "-m", "service"]
