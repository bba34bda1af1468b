# syntax=docker/dockerfile:1

# Installs the locked packages and builds the default models; the final image takes only the results.
FROM python:3.12-slim AS build
RUN python -m venv /opt/tilewave
ENV PATH=/opt/tilewave/bin:$PATH
WORKDIR /src
COPY . .
RUN --mount=type=cache,target=/var/cache/pip pip install --cache-dir /var/cache/pip --constraint requirements.lock .
RUN --mount=type=cache,target=/var/cache/pip --mount=type=cache,target=/models/.cache \
    cd /opt && python -m models --dir /models

# The load test: docker compose --profile load run --rm load
FROM build AS load
RUN --mount=type=cache,target=/var/cache/pip pip install --cache-dir /var/cache/pip --constraint requirements.lock ".[load]"
USER nobody
ENTRYPOINT ["locust", "-f", "load_tests/locustfile.py"]

FROM python:3.12-slim AS service
RUN useradd --create-home --uid 10001 tilewave
COPY --from=build /opt/tilewave /opt/tilewave
COPY --from=build --chown=tilewave /models /models
ENV PATH=/opt/tilewave/bin:$PATH TILEWAVE_MODELS=/models
USER tilewave
WORKDIR /home/tilewave
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s --retries=3 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/v2/health/ready', timeout=2)"]
ENTRYPOINT ["python", "-m", "service", "--host", "0.0.0.0"]
