# A small SLURM cluster for contributors, in one container; compose.yaml beside it explains how to use it.
# tests/slurm/cluster installs the packages and makes the cluster, as in CI. For the digest of the base, see Dockerfile.

FROM debian:12.13-slim
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates git make python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN --mount=type=bind,source=tests/slurm/cluster,target=/mnt/cluster \
    bash /mnt/cluster install && rm -rf /var/lib/apt/lists/*
# The mounted checkout belongs to another user, which git allows only for a safe.directory.
RUN git config --system --add safe.directory /repo
# make uses the environment in the volume /venv, since the checkout's .venv is for the Python of the host.
ENV MAKEFLAGS="VENV=/venv" PATH=/venv/bin:$PATH PYTHONDONTWRITEBYTECODE=1 SLURM_CONF=/run/slurm/slurm.conf
WORKDIR /repo
HEALTHCHECK --start-period=60s CMD ["scontrol", "ping"]
ENTRYPOINT ["docker/slurm.sh"]
CMD ["bash"]
