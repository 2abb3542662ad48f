# An image with the package and the pinned versions: docker build --build-arg COMMIT=$(git rev-parse HEAD) -t clex-train .
#     docker run --gpus all --shm-size 8g -v "$PWD":/work clex-train clex-train train +experiment=tiny_base
# torch's wheels are built for CUDA 13.0. `devel` has nvcc: DeepSpeed and flash-attn compile extensions.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04

COPY --from=ghcr.io/astral-sh/uv:0.13.9 /uv /usr/local/bin/uv

# g++ compiles DeepSpeed's CPU Adam at run time, for engine.offload. The image is pinned; Ubuntu removes old versions of g++.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

# The suite is run on Python 3.11; Ubuntu has a newer one.
ENV UV_PYTHON_INSTALL_DIR=/opt/python VIRTUAL_ENV=/opt/clex-train PATH=/opt/clex-train/bin:$PATH
RUN uv venv --python 3.11 "$VIRTUAL_ENV"

# Before the code, so that a change of it does not install torch again.
WORKDIR /src
COPY requirements.txt constraints.txt ./
RUN uv pip install --no-cache -r requirements.txt -c constraints.txt

COPY . .
# The build records the commit from this file, because .git is not copied.
ARG COMMIT=""
RUN printf '%s\n' "$COMMIT" > COMMIT && uv pip install --no-cache --no-deps .

WORKDIR /work
CMD ["clex-train", "info"]
