# solq_lab with everything in it. The compiled operators need a C++ compiler, on a GPU also nvcc, which the extra `cuda` brings;
# torch brings the CUDA libraries. Without a GPU:
#   docker build --build-arg BASE=ubuntu:24.04 --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu --build-arg EXTRA=dev -t solq_lab .
ARG BASE=nvidia/cuda:13.0.1-runtime-ubuntu24.04

FROM ${BASE} AS system
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        ca-certificates g++ git make python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

FROM system
ARG TORCH_INDEX=""
ARG EXTRA=cuda
WORKDIR /solq_lab
COPY . .
RUN make install TORCH_INDEX="${TORCH_INDEX}" \
    && .venv/bin/pip install --no-cache-dir --constraint constraints.txt --editable ".[${EXTRA}]" \
    && chown -R 1000:1000 /solq_lab
ENV PATH=/solq_lab/.venv/bin:${PATH}
USER 1000
EXPOSE 8888
CMD ["jupyter", "lab", "--ip=0.0.0.0", "--no-browser", "notebooks"]
