# The GPU image: a NeMo base image with our lock installed over its Python packages.
#
#   docker build -t nemo_prolong .
#   docker run --rm --gpus all --ipc=host --ulimit memlock=-1 -v /data:/workspace/nemo_prolong/data \
#       -v /runs:/workspace/nemo_prolong/runs nemo_prolong torchrun --nproc-per-node 8 scripts/train.py +exp=sft
#
# The base brings the driver-side half: CUDA, NCCL, torch, Transformer Engine, apex. Pin it by digest for a cluster.
ARG BASE_IMAGE=nvcr.io/nvidia/nemo:25.11
FROM ${BASE_IMAGE}

# What the base must bring; another base, another pair.
ARG TRANSFORMER_ENGINE_VERSION=2.9
ARG MINIMUM_TORCH_VERSION=2.9.0a0
ARG USER_ID=10001

USER root
# PYTHONPATH and the constraints of the base would bring back its own NeMo and Megatron, or refuse ours.
ENV PYTHONPATH="" \
    PIP_CONSTRAINT="" \
    PIP_BREAK_SYSTEM_PACKAGES=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1

# One home for every cache, so that a volume can keep them. Hydra shows the short form of an error; the scripts print ours.
ENV HOME=/home/prolong \
    HF_HOME=/home/prolong/.cache/huggingface \
    NEMO_HOME=/home/prolong/.cache/nemo \
    HYDRA_FULL_ERROR=0 \
    PYTHONUNBUFFERED=1 \
    TOKENIZERS_PARALLELISM=false

RUN useradd --create-home --home-dir /home/prolong --uid ${USER_ID} --shell /bin/bash prolong
WORKDIR /workspace/nemo_prolong

# The lock first: a change of our sources does not install it again. The base may have made its environment without pip.
COPY requirements requirements
RUN (python -m pip --version || python -m ensurepip) > /dev/null \
    && python -m pip install --no-deps --require-hashes -r requirements/gpu-py312.lock

COPY . .
RUN python -m pip install --no-deps --no-build-isolation -e . \
    && mkdir -p runs data \
    && chown -R prolong:prolong /workspace/nemo_prolong /home/prolong

USER prolong
# As the user of the image, so that the helper Megatron compiles on its first import is in that user's cache (Hopper).
RUN TORCH_CUDA_ARCH_LIST=9.0 python docker/smoke.py --lock requirements/gpu-py312.lock --expect python=3.12 \
        --expect transformer_engine=${TRANSFORMER_ENGINE_VERSION} --at-least torch=${MINIMUM_TORCH_VERSION}
