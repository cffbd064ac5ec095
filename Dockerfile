# Two images, each with every package and its compiled kernels:
#
#   docker build --target cpu -t segcore .     # small torch wheels
#   docker build --target cuda -t segcore .    # run it with --gpus all, and --shm-size 1g for several GPUs
#   docker run --rm -v "$PWD:/work" --user "$(id -u)" segcore ddp-seg predict runs/mine photos results
#
# Any user may run them, so what is downloaded lands in /tmp; `-v weights:/tmp/.cache` keeps it.
FROM python:3.12-slim-bookworm AS base
RUN pip install --no-cache-dir uv
ENV UV_SYSTEM_PYTHON=1 UV_NO_CACHE=1 UV_PYTHON_DOWNLOADS=never
WORKDIR /src
COPY packages packages

FROM base AS cpu-kernels
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN CMAKE_ARGS=-DSEG_CUDA=OFF uv build --wheel --out-dir /wheels packages/cuda-ops

# Ubuntu 24.04 has the same Python. The wheel holds the CUDA runtime and needs nothing of this stage.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04 AS cuda-kernels
RUN apt-get update && apt-get install -y --no-install-recommends g++ python3-dev python3-venv && \
    rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /build && /build/bin/pip install --no-cache-dir build
COPY packages/cuda-ops /src/cuda-ops
RUN CMAKE_ARGS=-DSEG_CUDA=ON /build/bin/python -m build --wheel --outdir /wheels /src/cuda-ops

FROM base AS packages
RUN for package in segcore ddp ddps ddrnet dgmn2; do uv build --wheel --out-dir /wheels "packages/$package"; done

FROM base AS cpu
COPY --from=cpu-kernels /wheels /wheels
COPY --from=packages /wheels /wheels
RUN UV_TORCH_BACKEND=cpu uv pip install /wheels/*.whl && rm -r /src /wheels
ENV HOME=/tmp
WORKDIR /work
CMD ["segcore", "--help"]

FROM base AS cuda
COPY --from=cuda-kernels /wheels /wheels
COPY --from=packages /wheels /wheels
RUN uv pip install /wheels/*.whl && rm -r /src /wheels
ENV HOME=/tmp NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /work
CMD ["segcore", "--help"]
