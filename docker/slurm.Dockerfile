# A small SLURM cluster for contributors, in one container; compose.yaml beside it says how to use it.
# The packages and the cluster are those of CI's tests: both come from tests/slurm/cluster. Digest: see Dockerfile.

FROM debian:12.13-slim
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates git make python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN --mount=type=bind,source=tests/slurm/cluster,target=/mnt/cluster \
    bash /mnt/cluster install && rm -rf /var/lib/apt/lists/*
# The checkout is mounted and belongs to somebody else, which git wants to be told.
RUN git config --system --add safe.directory /repo
# make's environment is not the checkout's .venv, whose Python is another; see compose.yaml.
ENV MAKEFLAGS="VENV=/venv" PATH=/venv/bin:$PATH PYTHONDONTWRITEBYTECODE=1 SLURM_CONF=/run/slurm/slurm.conf
WORKDIR /repo
HEALTHCHECK --start-period=60s CMD ["scontrol", "ping"]
ENTRYPOINT ["docker/slurm.sh"]
CMD ["bash"]
