# syntax=docker/dockerfile:1
# The images: `service` for CPUs, `service-cuda` for NVIDIA GPUs, `load` for load tests. python -m deploy.container walks
# through every command of this file without Docker and lists what the images hold.

# Debian's own Python, 3.11: security updates come from Debian, and it is the version that the tests run with.
FROM debian:bookworm-slim AS python
RUN apt-get update && apt-get install --yes --no-install-recommends python3 && rm -rf /var/lib/apt/lists/*

# Installs the locked packages and builds the default models; the images take only the results.
FROM python AS build
RUN apt-get update && apt-get install --yes --no-install-recommends binutils ca-certificates python3-venv
RUN python3 -m venv /opt/tilewave
ENV PATH=/opt/tilewave/bin:$PATH PIP_CACHE_DIR=/var/cache/pip
WORKDIR /src
COPY . .
RUN --mount=type=cache,target=/var/cache/pip pip install --constraint requirements.lock .
RUN --mount=type=cache,target=/var/cache/pip cd /opt && python -m models --dir /models && rm -r /models/.cache

# The load test: docker compose run --rm load
FROM build AS load
RUN --mount=type=cache,target=/var/cache/pip pip install --constraint requirements.lock ".[load]"
USER nobody
ENTRYPOINT ["locust", "-f", "load_tests/locustfile.py"]

FROM build AS packages
RUN deploy/container/trim /opt/tilewave

FROM build AS packages-cuda
RUN --mount=type=cache,target=/var/cache/pip pip install --constraint requirements.lock ".[cuda]"
RUN deploy/container/trim /opt/tilewave

# What both images have: a user without rights, who may write to /tmp and to the cache of kernels, and to nothing else.
FROM python AS base
RUN useradd --uid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin tilewave \
    && install --directory --owner tilewave --group tilewave --mode 0700 /var/cache/tilewave
COPY --from=build /models /models
ENV PATH=/opt/tilewave/bin:$PATH PYTHONDONTWRITEBYTECODE=1 TILEWAVE_MODELS=/models TILEWAVE_CACHE_DIR=/var/cache/tilewave
VOLUME /var/cache/tilewave
USER tilewave
WORKDIR /tmp
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/v2/health/ready', timeout=2)"]
ENTRYPOINT ["python", "-m", "service", "--host", "0.0.0.0"]

# The driver comes from the host, through NVIDIA's container toolkit; everything else of CUDA is in Python packages.
FROM base AS service-cuda
COPY --from=packages-cuda /opt/tilewave /opt/tilewave
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    CUPY_CACHE_DIR=/var/cache/tilewave/cupy CUDA_CACHE_PATH=/var/cache/tilewave/driver

# Last, so that `docker build .` makes this one.
FROM base AS service
COPY --from=packages /opt/tilewave /opt/tilewave
