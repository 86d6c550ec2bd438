# sf-xfuser, xDiT and nvshmem4py in NVIDIA's PyTorch image. The container checks itself, then runs its command:
#
#     docker build --tag sf-xfuser .
#     docker run --gpus all --ipc host --ulimit memlock=-1 sf-xfuser torchrun --nproc-per-node 8 -m xfuser.runner \
#         --model FLUX.1-dev --prompt "a red chair" --sp-backend torus
#
# Another image: --build-arg IMAGE=... with PyTorch 2.8 or newer; for CUDA 12 also --build-arg NVSHMEM=nvshmem-cu12.
ARG IMAGE=nvcr.io/nvidia/pytorch:25.10-py3
FROM ${IMAGE}
ARG NVSHMEM=nvshmem

WORKDIR /opt/sf-xfuser
COPY . .
# The image's own constraints (/etc/pip/constraint.txt) keep its PyTorch; pyproject.toml has the other versions.
# hadolint ignore=DL3013
RUN python -m pip install --no-cache-dir ".[xdit,${NVSHMEM},metrics]"

WORKDIR /workspace
ENTRYPOINT ["/bin/sh", "-c", "sf-xfuser doctor && exec \"$@\"", "sf-xfuser"]
CMD ["sf-xfuser", "doctor", "--verbose"]
